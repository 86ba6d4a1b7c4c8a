"""The recipes for a data set of one's own: what they make of a few images, and what a run says of it."""

import re
import time
from types import SimpleNamespace

import pytest
import torch

import ssd
import train
from engine.failures import Interrupted
from engine.run import Run
from engine.stopping import Stopping
from tests import tiny
from view import charts


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(ssd.family.MODELS, "tiny", tiny.MODEL)


@pytest.fixture
def console(data_path, tmp_path, capsys):
    """What a run prints, with flags, on the 12 images of the tiny set."""

    def run(*flags: str) -> str:
        arguments = [*tiny.TINY, "--data-path", data_path, "--output-dir", tmp_path, "--workers", 0, *flags]
        train.main(train.parse_args([str(argument) for argument in arguments]))
        return capsys.readouterr().out

    return run


def test_an_epoch_of_few_images_is_longer_and_a_resumed_run_has_the_same(console):
    """160 samples in steps of 3 images are 53 steps."""
    small = ["--recipe", "small", "--eval-freq", 0, "--resume", "auto", "--print-freq", 1]
    first = console(*small, "--max-steps", 3)
    assert "These are fewer than --epoch-samples 160: an epoch passes over them more than once" in first
    assert "Learning rate 6.12372e-05 = 0.0001 x 0.612372 (--scale-lr) for a global batch of 3" in first
    second = console(*small, "--max-steps", 54)
    assert "Continuing after 3 steps" in second
    assert re.findall("Changed since .*: (.*)", second) == ["--max-steps 3 -> 54"]
    assert "Epoch: [0]  [53/53]" in second
    assert "Epoch: [1]  [1/1]" in second
    with pytest.raises(ValueError, match="made with --epoch-samples 160, this run has 12; they must agree"):
        console(*small, "--epoch-samples", 12)


def test_a_batch_may_be_larger_than_the_data_set(console):
    said = console("--recipe", "small", "--batch-size", 32, "--eval-freq", 0, "--max-steps", 1)
    assert "Done: 1 steps" in said


def test_fine_tuning_keeps_the_detector_but_for_its_classes(console, tmp_path):
    detector = tiny.MODEL(num_classes=5)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    said = console("--recipe", "finetune", "--weights", tmp_path / "detector.pth", "--max-steps", 1, "--eval-freq", 0)
    assert re.search("Kept from .*detector.pth: all weights but those for its classes", said)


def test_only_a_training_begins_with_the_weights_of_the_recipe():
    """``--test-only`` evaluates what it is told to."""
    assert train.parse_args(["--recipe", "finetune"]).weights == "SSD300_VGG16_Weights.COCO_V1"
    assert train.parse_args(["--recipe", "finetune", "--test-only"]).weights is None
    assert train.parse_args(["--recipe", "finetune", "--test-only", "--weights", "a.pth"]).weights == "a.pth"


def test_the_time_left_is_reckoned_from_the_pace_since_the_start(monkeypatch):
    """Of this process: a run that goes on after 100 steps, has made 20 in 40 seconds, and has 80 before it."""
    now = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    state = SimpleNamespace(global_step=100)
    run = Run(state, 200, 1, 0, validation=None, checkpoints=None, stopping=None)
    state.global_step, now = 120, 1040.0
    assert run.seconds_left() == pytest.approx(160)


def test_the_last_learning_curve_has_the_last_evaluation_and_none_is_drawn_of_nothing(console, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "learning_curve", lambda *curves: drawn.append(curves) or torch.zeros(3, 9, 9).byte())
    console("--epochs", 2, "--print-freq", 4, "--checkpoint-freq", 2)
    # after the first epoch none; then by turns that of report.html, which has what is not logged yet, and the run's
    assert [len(metrics.get("AP", [[]])[0]) for _, metrics in drawn] == [0, 1, 1, 2, 2]
    monkeypatch.setattr(Stopping, "stop_if_asked", interrupt)
    with pytest.raises(Interrupted):
        console("--output-dir", tmp_path / "stopped")
    assert (tmp_path / "stopped/checkpoint.pth").exists()
    assert len(drawn) == 5


def interrupt(self, wait: bool = False) -> None:
    raise Interrupted("stopped")


def test_a_run_says_how_much_time_it_has_left(console):
    """Of the epoch, and of all: the last line of the last epoch has none."""
    lines = re.findall(r"eta: (\S+) \(run: (\S+)\)", console("--epochs", 2, "--print-freq", 2, "--eval-freq", 0))
    assert len(lines) == 4
    assert lines[-1] == ("0:00:00", "0:00:00")


def test_a_collapsed_run_says_so_at_its_evaluation(console, monkeypatch):
    """Whose layers give nothing but zeros, as if all units had died."""
    told = "Collapsed: what 2 of 2 feature maps predict is the same for every image. Begin anew with --recipe small"
    assert "Collapsed" not in console("--lr", 1e-3, "--max-steps", 2, "--lr-warmup-steps", 0)
    monkeypatch.setattr(
        tiny.TinyBackbone, "forward", lambda self, images: [torch.zeros(len(images), 8, side, side) for side in (8, 4)]
    )
    assert told in console("--lr", 1e-3, "--max-steps", 2, "--lr-warmup-steps", 0)
