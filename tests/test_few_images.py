"""The recipes for a data set of one's own: what they make of a few images, and what a run says of it."""

import re

import pytest
import torch

import ssd
import train
from tests import tiny


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


def test_few_images_are_seen_more_often_and_a_resumed_run_sees_them_as_often(console):
    small = ["--recipe", "small", "--eval-freq", 0, "--resume", "auto"]
    first = console(*small, "--max-steps", 3)
    assert "Epochs: 267, in which 12 images are seen as often in all as the 160 that the recipe small" in first
    assert "Learning rate 6.12372e-05 = 0.0001 x sqrt(3 / 8) (--scale-lr) for a global batch of 3" in first
    second = console(*small, "--max-steps", 5)
    assert "Continuing after 3 steps" in second
    assert re.findall("Changed since .*: (.*)", second) == ["--max-steps 3 -> 5"]
    given = console(*small, "--max-steps", 7, "--epochs", 80)
    assert "Epochs: " not in given
    assert "--epochs 267 -> 80" in given


def test_the_warm_up_of_the_recipe_ends_with_any_batch_and_number_of_images(console):
    """Also with one step per epoch."""
    assert "Done: 1 steps" in console("--recipe", "small", "--batch-size", 12, "--eval-freq", 0, "--max-steps", 1)


def test_fine_tuning_keeps_the_detector_but_for_its_classes(console, tmp_path):
    detector = tiny.MODEL(num_classes=5)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    said = console("--recipe", "finetune", "--weights", tmp_path / "detector.pth", "--max-steps", 1, "--eval-freq", 0)
    assert "Epochs: 134, in which 12 images" in said
    assert re.search("Kept from .*detector.pth: all weights but those for its classes", said)


def test_a_run_says_how_much_time_it_has_left(console):
    """Of the epoch, and of all: the last line of the last epoch has none."""
    lines = re.findall(r"eta: (\S+) \(run: (\S+)\)", console("--epochs", 2, "--print-freq", 2, "--eval-freq", 0))
    assert len(lines) == 4
    assert lines[-1] == ("0:00:00", "0:00:00")


def test_a_collapsed_run_says_so_at_its_evaluation(console, monkeypatch):
    """Whose layers give nothing but zeros, as if all units had died."""
    told = "Collapsed: what 2 of 2 feature maps predict is the same for every image. Begin anew with --recipe small"
    assert told not in console("--lr", 1e-3, "--max-steps", 2, "--lr-warmup-steps", 0)
    monkeypatch.setattr(
        tiny.TinyBackbone, "forward", lambda self, images: [torch.zeros(len(images), 8, side, side) for side in (8, 4)]
    )
    assert told in console("--lr", 1e-3, "--max-steps", 2, "--lr-warmup-steps", 0)
