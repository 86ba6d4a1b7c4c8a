import json
from pathlib import Path

import pytest
import torch

import utils


def test_an_error_for_the_user_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"error: --device cuda: PyTorch finds no GPU here"), utils.one_line_errors():
        utils.init_distributed("cuda")


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(utils, "ROOT", Path(__file__).parent)
    with pytest.raises(ValueError, match="could not convert"), utils.one_line_errors():
        torch.zeros(1).new_tensor(float("one"))
    with pytest.raises(ValueError, match="zip"), utils.one_line_errors():
        list(zip([1], [1, 2], strict=True))  # by a built-in, though called from a file of the repository
    with pytest.raises(SystemExit, match="for the user"), utils.one_line_errors():
        raise ValueError("for the user")
    with pytest.raises(RuntimeError), utils.one_line_errors():
        torch.zeros(2) + torch.zeros(3)


def make_step_log(tmp_path, **settings) -> tuple[utils.RunLog, utils.StepLog]:
    log = utils.RunLog(tmp_path)
    defaults = {"epoch": 2, "first_step": 0, "last_step": 5, "global_step": 10, "images_per_step": 4, "print_freq": 2}
    return log, utils.StepLog(log=log, **(defaults | settings))


def test_log_lines_hold_means_and_come_at_the_right_steps(tmp_path, capsys):
    log, steps = make_step_log(tmp_path)
    for value in (1.0, 3.0, 5.0, 7.0, 9.0):
        losses = {"bbox_regression": torch.tensor(value), "classification": torch.tensor(1.0)}
        steps.add({"loss": sum(losses.values()), **losses})
        steps.update(lr=0.01)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["bbox_regression"], line["loss"]) for line in lines] == [
        (12, 2, 3),
        (14, 6, 7),
        (15, 9, 10),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("Epoch: [2]  [4/5]  eta: 0:00:00  lr: 0.010000  loss: 7.0000 (5.0000)")
    assert list(tmp_path.glob("events.out.tfevents*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_found_between_lines(tmp_path, value):
    log, steps = make_step_log(tmp_path, print_freq=100)
    steps.add({"loss": torch.tensor(value), "bbox_regression": torch.tensor(1.0)})
    steps.update(lr=0.01)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch 2"):
        steps.before_checkpoint()
    log.close()


def test_a_continued_log_drops_what_came_later_and_what_a_crash_cut(tmp_path):
    lines = [
        '{"kind": "train", "step": 2}',
        '{"kind": "val", "step": 2}',
        '{"kind": "train", "step": 4}',
        '{"kind": "tr',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = utils.RunLog(tmp_path, last_steps={"train": 3, "val": 1})
    log.metrics("train", 4, {"loss": 0.5})
    log.close()
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [{"kind": "train", "step": 2}, {"kind": "train", "step": 4, "loss": 0.5}]


def test_watch_yields_everything_and_counts_the_wait(tmp_path):
    log, steps = make_step_log(tmp_path)
    assert list(steps.watch([{"n": i, "fault": ["", ""]} for i in range(3)])) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert steps.wait_time > 0
    log.close()


def test_a_step_of_several_batches_logs_their_mean(tmp_path):
    log, steps = make_step_log(tmp_path, print_freq=1)
    for values in ((1.0, 3.0), (10.0, 20.0)):
        for value in values:
            steps.add({"loss": torch.tensor(value)})
        steps.update(lr=0.1)
    log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(11, 2.0), (12, 15.0)]


def test_skipped_samples_are_counted_and_each_fault_is_named_once(tmp_path, capsys):
    log, steps = make_step_log(tmp_path)
    for _ in steps.watch([{"fault": [fault, ""]} for fault in ("a is bad", "b is bad", "a is bad", "")]):
        steps.add({"loss": torch.tensor(1.0)})
        steps.update(lr=0.1)
    assert log.num_skipped == 3
    log.close()
    assert [line for line in capsys.readouterr().out.splitlines() if "Skipped" in line] == [
        "Skipped a is bad",
        "Skipped b is bad",
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["samples"], r["faults"]) for r in records if r["kind"] == "skipped"] == [
        (2, ["a is bad", "b is bad"]),
        (3, []),
    ]
    assert [r["skipped"] for r in records if r["kind"] == "train"] == [2, 3]


def test_batches_move_with_their_nested_parts():
    moved = utils.to_device({"a": torch.zeros(2), "b": {"c": torch.ones(1)}}, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"]["c"].is_meta


@pytest.mark.parametrize(("asked", "expected"), [(None, "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_gpu_has_its_number(monkeypatch, asked, expected):
    """PyTorch takes no other."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert utils.init_distributed(asked) == torch.device(expected)
    assert chosen == [torch.device(expected)]


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    backends, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert utils.init_distributed(None) == torch.device("cuda:1")
    assert (chosen, backends) == ([torch.device("cuda:1")], ["nccl"])
