"""A run that is continued from any of its steps equals one that was never interrupted, bit for bit."""

import ast
import re

import pytest
import torch

import ssd
import train
from tests.conftest import SMALL
from tests.tiny import MODEL, TINY

STEPS_PER_EPOCH = 4  # of 3 images; all 12 of the tiny set have boxes
STATE = ("model", "optimizer", "lr_scheduler", "scaler", "rng", "epoch", "step")


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def train_to(data_path, monkeypatch):
    """Trains in this process up to a step, and returns the ids of the images of each batch."""
    seen = []
    forward = train.BatchLosses.forward

    def recording_forward(self, batch):
        seen.append(batch["image_id"])
        return forward(self, batch)

    monkeypatch.setattr(train.BatchLosses, "forward", recording_forward)
    monkeypatch.setitem(ssd.family.MODELS, "tiny", MODEL)

    def run(step: int, output_dir, *flags) -> list[list[int]]:
        seen.clear()
        arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--epochs", 9, "--max-steps", step]
        arguments += ["--output-dir", output_dir, *flags]
        train.main(train.parse_args([str(argument) for argument in arguments]))
        return list(seen)

    return run


def assert_equal_states(first, second) -> None:
    first, second = load(first), load(second)
    for key in STATE:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=key)
    torch.testing.assert_close(first.get("model_ema"), second.get("model_ema"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "last_step", "steps_on"),
    [
        ([], 6, 1),
        (TINY, 7, 7),
        ([*TINY, "--amp"], 7, 7),
        ([*TINY, "--amp", "fp16"], 7, 7),
        ([*TINY, "--accumulate", 2, "--ema", 0.7], 7, 7),
        ([*TINY, "--opt", "adamw", "--lr-scheduler", "cosineannealinglr"], 7, 7),
    ],
    ids=["resnet18", "tiny", "bf16", "fp16", "accumulate", "adamw"],
)
def test_from_every_step(train_to, tmp_path, flags, last_step, steps_on):
    """With warm-up (three steps), order, augmentation and momentum under way, and in another number of workers.

    Where ``steps_on`` is less than what is left, the later steps follow from those that began with them. What the flags
    add to the state is the same for every network.
    """
    batches_per_step = 2 if "--accumulate" in flags else 1
    whole = tmp_path / "whole"
    seen = train_to(last_step, whole, "--workers", 0, "--checkpoint-freq", 1, "--keep", 99, *flags)
    assert len(seen) == last_step * batches_per_step
    assert (load(whole / "checkpoint.pth")["scaler"] != {}) == ("fp16" in flags)
    assert ("model_ema" in load(whole / "checkpoint.pth")) == ("--ema" in flags)
    for step in range(1, last_step):
        end = min(step + steps_on, last_step)
        output_dir = tmp_path / f"from_{step}"
        workers = 2 if step in (2, STEPS_PER_EPOCH) else 0
        resumed = ["--resume", whole / f"checkpoint_{step}.pth", "--workers", workers]
        rest = train_to(end, output_dir, *resumed, *flags)
        assert rest == seen[step * batches_per_step : end * batches_per_step]
        expected = whole / ("checkpoint.pth" if end == last_step else f"checkpoint_{end}.pth")
        assert_equal_states(output_dir / "checkpoint.pth", expected)
        (output_dir / "checkpoint.pth").unlink()


TWO_PROCESSES = """
import sys
from pathlib import Path
import ssd
from tests import test_resume
import train
import utils


def main(output_dir, arguments):
    device = utils.init_distributed("cpu", timeout=300)  # torchrun's processes can join only once
    utils.init_distributed, utils.cleanup_distributed = lambda *_: device, lambda: None
    seen = []
    forward = train.BatchLosses.forward

    def recording_forward(self, batch):
        seen.append(batch["image_id"])
        return forward(self, batch)

    def run(step, folder, *flags):
        seen.clear()
        flags = ["--max-steps", str(step), "--output-dir", str(output_dir / folder), *flags]
        train.main(train.parse_args(arguments + flags))
        return list(seen)

    train.BatchLosses.forward = recording_forward
    ssd.family.MODELS["tiny"] = test_resume.MODEL
    whole = run(5, "whole", "--workers", "0", "--checkpoint-freq", "1", "--keep", "99")
    for step in range(1, 5):
        path = output_dir / f"whole/checkpoint_{step}.pth"
        rest = run(step + 1, f"from_{step}", "--resume", str(path), "--workers", "2" if step == 3 else "0")
        batches = len(whole) // 5
        assert rest == whole[step * batches : (step + 1) * batches], (rest, whole)
        expected = "checkpoint.pth" if step == 4 else f"checkpoint_{step + 1}.pth"
        last = output_dir / f"from_{step}/checkpoint.pth"
        test_resume.assert_equal_states(last, output_dir / "whole" / expected)
    sys.stdout.write(f"process {whole}\\n")  # at once, or the other process' line may come between


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
"""


@pytest.mark.parametrize(
    "flags",
    [[], [*TINY, "--amp", "--accumulate", "2", "--batch-size", "1", "--ema", "0.7"]],
    ids=["resnet18", "accumulate"],
)
def test_from_every_step_with_two_processes(run, data_path, tmp_path, flags):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--epochs", 9, *flags]
    console = run(tmp_path / "script.py", tmp_path / "out", *arguments, processes=2).stdout
    lines = [line.removeprefix("process ") for line in console.splitlines() if line.startswith("process")]
    shares = [[i for batch in ast.literal_eval(line) for i in batch][:6] for line in lines]  # of the first epoch
    assert sorted(shares[0] + shares[1]) == list(range(1, 13))
    last = load(tmp_path / "out/whole/checkpoint.pth")
    assert last.get("model_ema", {}).get("n_averaged") == (5 if "--ema" in flags else None)


def test_fewer_processes_go_on_with_the_same_images(run, train_to, data_path, tmp_path):
    """Where they accumulate as many batches."""
    arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--epochs", 9, "--workers", 0]
    run("train.py", *arguments, "--max-steps", 1, "--output-dir", tmp_path, processes=2)
    expected = train_to(3, tmp_path / "alone", "--workers", 0, "--accumulate", 2)[2:]
    with pytest.raises(
        ValueError, match=r"with 2 processes and --accumulate 1, this run has 1 and 1; their product must"
    ):
        train_to(3, tmp_path, "--workers", 0, "--resume", "auto")
    assert train_to(3, tmp_path, "--workers", 0, "--resume", "auto", "--accumulate", 2) == expected


def test_flags_that_may_change_take_effect_and_are_named(train_to, tmp_path, capsys):
    train_to(2, tmp_path, "--workers", 0)
    train_to(3, tmp_path, "--workers", 1, "--resume", "auto", "--lr-steps", 1, 2, "--lr", 0.004)
    console = capsys.readouterr().out
    path = tmp_path / "checkpoint.pth"
    for change in ("--max-steps 2 -> 3", "--workers 0 -> 1", "--lr-steps [80, 110] -> [1, 2]", "--lr 0.002 -> 0.004"):
        assert f"Changed since {path}: {change}" in console
    assert console.count("Changed since") == 4


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--model", "ssd300_vgg16"], "--model ssd300_resnet18, this run has ssd300_vgg16; they must agree"),
        (["--seed", 1], "--seed 0, this run has 1; they must agree"),
        (["--batch-size", 4], "--batch-size 3, this run has 4; they must agree"),
        (["--opt", "adamw"], "--opt sgd, this run has adamw; they must agree"),
        (["--momentum", 0.5], "--momentum 0.9, this run has 0.5; they must agree"),
        (["--ema", 0.9], "--ema None, this run has 0.9; they must agree"),
        (["--norm-weight-decay", 0], "--norm-weight-decay None, this run has 0.0; they must agree"),
        (["--freeze-backbone"], "--freeze-backbone False, this run has True; they must agree"),
        (["--input-scaling", "caffe"], "--input-scaling imagenet, this run has caffe; they must agree"),
        (["--default-boxes", "voc"], "--default-boxes default, this run has voc; they must agree"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_may_not_change_are_errors(train_to, tmp_path, first_step, flags, fault):
    with pytest.raises(ValueError, match=re.escape(f"was made with {fault}")):
        train_to(2, tmp_path, "--workers", 0, "--resume", first_step, *flags)


@pytest.fixture(scope="module")
def first_step(data_path, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("first")
    arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--epochs", 9, "--max-steps", 1, "--workers", 0]
    train.main(train.parse_args([str(argument) for argument in [*arguments, "--output-dir", output_dir]]))
    return output_dir / "checkpoint.pth"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_scaling", "foo"),
        ("input_scaling", ["caffe"]),
        ("default_boxes", "pascal"),
        ("default_boxes", None),
        ("trainable_backbone_layers", "x"),
        ("trainable_backbone_layers", 2.5),
    ],
)
def test_flags_of_a_checkpoint_that_make_no_sense(train_to, tmp_path, first_step, name, value):
    content = load(first_step)
    content["args"][name] = value
    ssd.save_file(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd.pth: damaged, .* it has --{name.replace('_', '-')} "):
        train_to(2, tmp_path, "--workers", 0, "--resume", tmp_path / "odd.pth")


@pytest.mark.parametrize("name", ["model", "momentum", "world_size", "accumulate", "default_boxes"])
def test_a_checkpoint_that_lacks_a_flag(train_to, tmp_path, first_step, name):
    content = load(first_step)
    del content["args"][name]
    ssd.save_file(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth: damaged, or made by another program: it does not tell"):
        train_to(2, tmp_path, "--workers", 0, "--resume", tmp_path / "odd.pth")


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_and_set_aside(train_to, tmp_path, capsys):
    expected = tmp_path / "whole"
    train_to(4, expected, "--workers", 0)
    train_to(3, tmp_path, "--workers", 0, "--checkpoint-freq", 1)
    latest = tmp_path / "checkpoint.pth"
    damaged = bytearray(latest.read_bytes())
    damaged[len(damaged) // 3] ^= 4
    latest.write_bytes(damaged)
    train_to(4, tmp_path, "--workers", 0, "--resume", "auto")
    console = capsys.readouterr().out
    assert f"{latest}: damaged (its content does not have the hash that it was saved with); continuing from" in console
    assert "Continuing after 2 steps" in console
    assert (tmp_path / "previous-1/checkpoint.pth").read_bytes() == damaged
    assert_equal_states(latest, expected / "checkpoint.pth")


def test_what_is_later_than_the_checkpoint_to_continue_from_is_set_aside(train_to, tmp_path):
    """Else ``--resume auto`` might take it for the newest of the new branch."""
    train_to(4, tmp_path, "--workers", 0, "--checkpoint-freq", 1, "--keep", 9)
    (tmp_path / "report.html").touch()
    train_to(3, tmp_path, "--workers", 0, "--resume", tmp_path / "checkpoint_2.pth", "--lr", 0.004)
    assert {path.name for path in tmp_path.glob("checkpoint*")} == {"checkpoint.pth", "checkpoint_2.pth"}
    aside = {path.name for path in (tmp_path / "previous-1").iterdir()}
    assert aside == {"checkpoint.pth", "checkpoint_3.pth", "report.html"}
    assert load(tmp_path / "checkpoint.pth")["lr_scheduler"]["last_epoch"] == 3
