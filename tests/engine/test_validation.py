"""Evaluation within a training run, and the loss on the validation set."""

import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

import coco
import coco_utils
import evaluate
import ssd
import train
from coco import scoring
from engine import inference
from engine.training_state import TrainingState
from tests import tiny
from tests.conftest import SMALL, float64, infer
from view import reports

STEPS_PER_EPOCH = 4


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(ssd.family.MODELS, "tiny", tiny.MODEL)


def train_epochs(data_path, output_dir, *flags) -> dict:
    arguments = [*tiny.TINY, "--data-path", data_path, "--epochs", 2, "--workers", 0, "--output-dir", output_dir]
    train.main(train.parse_args([str(argument) for argument in [*arguments, *flags]]))
    return torch.load(output_dir / "checkpoint.pth", weights_only=True)


def validation_lines(output_dir) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "val"]


def after(event: threading.Event, function: Callable) -> Callable:
    """The function, which first waits for the event, for a minute at most."""

    def waiting(*arguments):
        event.wait(timeout=60)
        return function(*arguments)

    return waiting


@pytest.fixture
def slow_scoring(monkeypatch):
    """Scoring waits for the first step after the evaluation; the APs of a run are 0.5 and then 0.25."""
    steps_on, aps, waited = threading.Event(), [0.5, 0.25, 0.5, 0.25], []
    score, update = inference.score, TrainingState.optimizer_step

    def slow_score(*arguments):
        scores = score(*arguments)
        scores.metrics["AP"] = aps.pop(0)
        if scores.metrics["AP"] == 0.5:
            waited.append(steps_on.wait(timeout=60))
        return scores

    def telling_update(state):
        gradient_norm = update(state)
        if state.global_step > STEPS_PER_EPOCH:
            steps_on.set()
        return gradient_norm

    monkeypatch.setattr(inference, "score", slow_score)
    monkeypatch.setattr(TrainingState, "optimizer_step", telling_update)
    return waited


def test_scoring_goes_on_beside_the_next_epoch(data_path, tmp_path, slow_scoring, capsys):
    final = train_epochs(data_path, tmp_path / "both", "--print-freq", 1)
    assert slow_scoring == [True]
    console = capsys.readouterr().out
    assert console.index("Epoch: [1]  [1/4]") < console.index("Evaluation in epoch 0")
    assert [(line["epoch"], line["step"], line["AP"]) for line in validation_lines(tmp_path / "both")] == [
        (0, STEPS_PER_EPOCH, 0.5),
        (1, 2 * STEPS_PER_EPOCH, 0.25),
    ]
    assert final["evaluated_step"] == 2 * STEPS_PER_EPOCH
    # the best model is the one that was evaluated, not what it had become when its score was known
    best = torch.load(tmp_path / "both/best.pth", weights_only=True)
    first_epoch = train_epochs(data_path, tmp_path / "first", "--eval-freq", 0, "--max-steps", STEPS_PER_EPOCH)
    for key in ("model", "optimizer", "lr_scheduler"):
        torch.testing.assert_close(best[key], first_epoch[key], rtol=0, atol=0)
    assert (best["evaluated_step"], best["best_ap"]) == (STEPS_PER_EPOCH, 0.5)


def test_scoring_takes_no_line_from_the_console(data_path, tmp_path, monkeypatch, capsys):
    """Steps that are printed while the other thread is within the scorer."""
    steps_on = threading.Event()
    update = TrainingState.optimizer_step

    def telling_update(state):
        gradient_norm = update(state)
        if state.global_step > STEPS_PER_EPOCH + 1:
            steps_on.set()
        return gradient_norm

    monkeypatch.setattr(scoring, "make_evaluator", after(steps_on, scoring.make_evaluator))
    monkeypatch.setattr(TrainingState, "optimizer_step", telling_update)
    train_epochs(data_path, tmp_path, "--print-freq", 1)
    assert steps_on.is_set()
    assert capsys.readouterr().out.count("Epoch: [") == 2 * STEPS_PER_EPOCH


@pytest.mark.usefixtures("slow_scoring")
def test_checkpoints_wait_for_the_scores(data_path, tmp_path, monkeypatch):
    """A checkpoint that says that an epoch was evaluated is not saved before its scores."""
    saved = []
    save_file = ssd.save_file

    def spy(checkpoint, path):
        saved.append((checkpoint["evaluated_step"], [line["step"] for line in validation_lines(tmp_path)]))
        save_file(checkpoint, path)

    monkeypatch.setattr(ssd, "save_file", spy)
    train_epochs(data_path, tmp_path, "--checkpoint-freq", 1, "--max-steps", STEPS_PER_EPOCH + 2)
    assert {evaluated for evaluated, _ in saved} == {0, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2}
    assert all(evaluated == (lines or [0])[-1] for evaluated, lines in saved)


def test_scores_that_a_crash_prevented_are_made_up_for(data_path, tmp_path, monkeypatch):
    """The run dies in the epoch after an evaluation, whose scores nobody has seen."""
    died = threading.Event()
    update = TrainingState.optimizer_step

    def dies_in_the_sixth(state):
        if state.global_step == STEPS_PER_EPOCH + 1:
            died.set()
            raise KeyboardInterrupt
        return update(state)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "score", after(died, inference.score))
        patch.setattr(TrainingState, "optimizer_step", dies_in_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            train_epochs(data_path, tmp_path)
    assert validation_lines(tmp_path) == []
    final = train_epochs(data_path, tmp_path, "--resume", "auto")
    assert [line["step"] for line in validation_lines(tmp_path)] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert final["evaluated_step"] == 2 * STEPS_PER_EPOCH


def test_an_error_in_scoring_ends_the_run(data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_epochs(data_path, tmp_path)
    assert not (tmp_path / "best.pth").exists()


def test_the_report_has_the_learning_curve_up_to_its_own_evaluation(data_path, tmp_path, monkeypatch):
    """Which is logged later, by the thread that trains."""
    drawn = []
    draw = reports.draw_learning_curve

    def spy(records, steps_per_epoch):
        drawn.append([one["step"] for one in records if one["kind"] == "val"])
        return draw(records, steps_per_epoch)

    monkeypatch.setattr(reports, "draw_learning_curve", spy)
    train_epochs(data_path, tmp_path, "--val-loss")
    assert [STEPS_PER_EPOCH] in drawn
    assert drawn[-2:] == [[STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]] * 2  # of the report, and in pictures/
    page = (tmp_path / "report.html").read_text()
    (line,) = validation_lines(tmp_path)[1:]
    for text in ("<h1>tiny after 2 epochs</h1>", "Learning curve", f"Validation loss {line['loss']:.4f}", "training"):
        assert text in page


def test_validation_loss_is_logged(data_path, tmp_path):
    train_epochs(data_path, tmp_path, "--max-steps", 1, "--val-loss")
    (line,) = validation_lines(tmp_path)
    assert line["loss"] == pytest.approx(line["bbox_regression"] + line["classification"])
    assert line["images/s"] > 0
    assert line["images scored/s"] > 0


def loss_of(checkpoint, data_path, output_dir, *flags) -> float:
    """As evaluate.py measures it."""
    arguments = ["--checkpoint", checkpoint, "--data-path", data_path, "--device", "cpu", "--workers", 0, "--val-loss"]
    arguments += ["--batch-size", 3, "--output-dir", output_dir, *flags]
    evaluate.main(evaluate.get_args_parser().parse_args([str(argument) for argument in arguments]))
    return json.loads((output_dir / "metrics.json").read_text())["loss"]["loss"]


def test_the_average_is_evaluated_where_there_is_one(data_path, tmp_path, capsys):
    """In training, by evaluate.py and with --test-only; --no-ema evaluates the weights themselves."""
    train_epochs(data_path, tmp_path, "--epochs", 1, "--ema", 0.9, "--lr", 0.1, "--val-loss")
    (line,) = validation_lines(tmp_path)
    best = tmp_path / "best.pth"
    assert capsys.readouterr().out.count("Evaluated is the average of the weights over about 10 steps (--ema 0.9)") == 1
    assert loss_of(best, data_path, tmp_path / "average") == pytest.approx(line["loss"], rel=1e-6)
    assert f"{best}: the moving average of its weights is taken (model_ema)\n" in capsys.readouterr().out
    assert abs(loss_of(best, data_path, tmp_path / "themselves", "--no-ema") - line["loss"]) > 0.01 * line["loss"]
    assert f"{best}: its weights are taken as they are (model), not their mov" in capsys.readouterr().out
    arguments = ["--test-only", "--resume", best, "--data-path", data_path, "--device", "cpu", "--workers", 0]
    arguments += ["--batch-size", 3, "--val-loss", "--output-dir", tmp_path / "test_only"]
    evaluate.evaluate_as_trained(train.parse_args([str(argument) for argument in arguments]))
    metrics = json.loads((tmp_path / "test_only/evaluation/metrics.json").read_text())
    assert metrics["loss"]["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert "the moving average of its weights is taken" in capsys.readouterr().out


def test_a_checkpoint_without_an_average_is_evaluated_as_it_is(data_path, tmp_path, capsys):
    train_epochs(data_path, tmp_path, "--max-steps", 1, "--eval-freq", 0)
    losses = [loss_of(tmp_path / "checkpoint.pth", data_path, tmp_path / "out", *flags) for flags in ([], ["--no-ema"])]
    assert losses[0] == losses[1]
    assert capsys.readouterr().out.count("checkpoint.pth: has no moving average of its weights (model_ema)\n") == 1


def test_validation_loss_is_that_of_one_batch_with_all_images(data_path):
    """In float64, where it does not matter what else is in a batch."""
    with float64():
        check_validation_loss(tiny.MODEL(num_classes=7).eval(), data_path)


def check_validation_loss(model: ssd.SSD, data_path) -> None:
    a = coco.read_annotations(data_path / "annotations/instances_val2017.json")

    def losses(*flags) -> tuple[dict, dict]:
        args = train.parse_args([*SMALL, "--workers", "0", "--val-loss", *flags])
        found = infer(args, model, a, data_path / "val2017")
        dataset = evaluate.make_validation_set(args, model, a, data_path / "val2017")
        with torch.inference_mode():
            batch = coco_utils.collate([dataset[row] for row in range(len(dataset))])
            expected = model.compute_loss(model(batch["image"]), *coco_utils.split_objects(batch["objects"]))
        return inference.score(a, found, "hotcoco").metrics["loss"], expected

    for batch_size in ("1", "3"):
        measured, expected = losses("--batch-size", batch_size)
        assert measured["loss"] == pytest.approx(sum(expected.values()).item(), rel=1e-10)
        assert measured["bbox_regression"] == pytest.approx(expected["bbox_regression"].item(), rel=1e-10)


def test_an_image_that_cannot_be_read_adds_nothing_to_the_loss(data_path, tmp_path):
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7).eval()
    a = coco.read_annotations(data_path / "annotations/instances_val2017.json")
    args = train.parse_args([*SMALL, "--workers", "0", "--val-loss", "--on-bad-image", "skip"])
    found = infer(args, model, a, tmp_path)
    assert len(found.faults) == len(a.image_ids)
    assert inference.score(a, found, "hotcoco").metrics["loss"]["loss"] == 0


def test_a_missing_or_doubled_image_is_an_error():
    shares = [inference.Inference(np.array(ids), np.zeros((0, 7)), None, []) for ids in ([1, 3], [2])]
    assert inference.merge(shares, np.array([3, 1, 2])).image_ids.tolist() == [1, 2, 3]
    for expected in ([1, 2, 3, 4], [1, 2], [1, 2, 2, 3]):
        with pytest.raises(RuntimeError, match="missing or came twice"):
            inference.merge(shares, np.array(expected))
    with pytest.raises(RuntimeError, match="missing or came twice"):
        inference.merge([*shares, shares[1]], np.array([1, 2, 3]))
