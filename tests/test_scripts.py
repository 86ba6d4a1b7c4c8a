"""The scripts as a user runs them, on a tiny data set."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import ssd300_vgg16 as torchvision_ssd300_vgg16
from torchvision.transforms.functional import to_tensor

import coco
import coco_utils
import evaluate
import ssd
import train
import utils
from coco import scoring
from engine import checkpoints, inference
from tests.conftest import SMALL, infer, pycocotools_stats
from tests.tiny import MODEL, TINY

STEPS_PER_EPOCH = 4  # of 3 images; all 12 of the tiny set have boxes


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def steps_done(checkpoint: dict) -> int:
    return (checkpoint["epoch"] + 1) * STEPS_PER_EPOCH + checkpoint["step"]


def assert_equal_training(first: dict, second: dict) -> None:
    """Bit for bit: weights, momentum, learning rate, random state, and progress."""
    for key in ("model", "optimizer", "lr_scheduler", "scaler", "rng", "epoch", "step"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(run, data_path, tmp_path_factory):
    """The output folder and console text of one epoch of training with evaluation."""
    output = tmp_path_factory.mktemp("trained")
    command = ["train.py", *SMALL, "--data-path", data_path, "--epochs", 1, "--workers", 1, "--print-freq", 1]
    return output, run(*command, "--output-dir", output).stdout


def test_training_writes_what_the_docs_promise(trained):
    output, console = trained
    names = {path.name for path in output.iterdir()}
    assert {"checkpoint.pth", "best.pth", "metrics.jsonl", "args.json", "pictures", "report.html"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    drawn = {path.name for path in (output / "pictures").iterdir()}
    assert len(drawn) == 7 + 3
    assert {"learning_curve.png", "precision_recall.png", "confusion_matrix.png", "0000_000001.png"} <= drawn
    assert "Training on" in console
    assert "Classes (6): circle, square, triangle, star, ring, cross" in console
    assert "Learning rate 0.002 for a global batch of 3 (1 x 3 images); the recipe lr_scheme is tuned for 32" in console
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ]" in console
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS_PER_EPOCH + 1))
    assert all(math.isfinite(line["loss"]) for line in steps)
    assert lines[-1]["kind"] == "val"
    assert set(scoring.METRICS) <= lines[-1].keys()


def test_checkpoint_is_plain_data(trained):
    checkpoint = load(trained[0] / "checkpoint.pth")
    expected = {"model", "optimizer", "lr_scheduler", "scaler", "epoch", "step", "args", "categories", "rng", "version"}
    assert expected | {"git"} <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 0)  # the first epoch is complete
    assert checkpoint["args"]["model"] == "ssd300_resnet18"
    assert checkpoint["categories"][0] == {"label": 1, "id": 1, "name": "circle"}
    names = {path.name for path in trained[0].iterdir()}
    assert not any(name.endswith(".tmp") for name in names)


def test_tensorboard_has_scalars_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0])).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/bbox_regression", "train/classification", "train/lr", "train/images/s"} <= scalars
    assert {f"val/{name}" for name in ("AP", "AP50", "AR100")} <= scalars
    charts = {"charts/precision_recall", "charts/confusion_matrix"}
    assert {"inputs", "detections/0000_000001"} | charts <= set(events.Tags()["images"])
    tensors = events.Tags()["tensors"]
    assert {"classes/text_summary", "precision_recall_at_IoU_0.50"} <= set(tensors)
    assert b"circle" in events.Tensors("classes/text_summary")[0].tensor_proto.string_val[0]


def evaluation_of(trained, data_path, output_dir) -> list:
    command = ["evaluate.py", "--checkpoint", trained[0] / "checkpoint.pth", "--data-path", data_path]
    return [*command, "--device", "cpu", "--workers", 0, "--batch-size", 3, "--output-dir", output_dir]


def test_results_do_not_depend_on_the_number_of_processes(run, trained, data_path, tmp_path, monkeypatch):
    """Seven images do not divide evenly among processes, and none may be lost or come twice.

    Each is a batch of its own, for rounding may depend on what else is in a batch; and on the threads of a process.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as under torchrun
    for processes in (1, 3):
        command = [*evaluation_of(trained, data_path, tmp_path / str(processes)), "--val-loss", "--batch-size", 1]
        run(*command, processes=processes)
    for name in ("metrics.json", "detections.json"):
        one, three = ((tmp_path / folder / name).read_text() for folder in "13")
        assert one == three
    assert json.loads((tmp_path / "1/metrics.json").read_text())["loss"]["loss"] > 0


def test_evaluate_gives_the_figures_of_training_and_of_pycocotools(run, trained, data_path, tmp_path):
    """The same batches in as many threads are computed alike; seven images do not fill the last one."""
    console = run(*evaluation_of(trained, data_path, tmp_path), "--pictures", 2, "--pictures-by", "random").stdout
    drawn = {path.name for path in (tmp_path / "pictures").glob("[0-9]*")}
    assert len(drawn) == 2
    assert drawn != {"0000_000001.png", "0001_000002.png"}  # the first
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    in_training = json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: metrics[name] for name in scoring.METRICS} == pytest.approx(
        {name: in_training[name] for name in scoring.METRICS}, abs=1e-12
    )
    assert metrics["counts"]["images"] == 7
    assert scoring.format_table(metrics) in console
    assert len(list((tmp_path / "pictures").iterdir())) == 2 + 2
    assert f"<dd>{metrics['AP']:.3f}</dd>" in (tmp_path / "report.html").read_text()

    expected = pycocotools_stats(data_path / "annotations/instances_val2017.json", tmp_path / "detections.json")
    assert [-1 if metrics[name] is None else metrics[name] for name in scoring.METRICS] == expected


@pytest.mark.parametrize("processes", [1, 2])
def test_a_results_file_gets_pycocotools_figures_without_a_model(run, tmp_path, processes):
    """With a crowd, an image without boxes, one without detections, an absent class, and all three sizes of objects."""
    boxes = [(10, 10, 20, 20), (40, 10, 50, 60), (100, 100, 200, 150), (300, 20, 150, 60), (5, 200, 31, 31)]
    annotations = [
        {"id": i + 1, "image_id": 1 + i % 2, "category_id": 3 + 4 * (i % 2), "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(i == 3)}
        for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 500, "height": 400} for i in (1, 2, 3, 4)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "absent"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    results = [
        {"image_id": one["image_id"], "category_id": category, "score": round(rng.random(), 2)}
        | {"bbox": [float(value) for value in np.abs(np.array(one["bbox"]) + rng.normal(0, spread, 4))]}
        for one in [*annotations, {"image_id": 3, "bbox": (5, 5, 80, 80)}]
        for category in (3, 7, 8)
        for spread in (1, 4)
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    flags = ["--detections", tmp_path / "results.json", "--val-annotations", tmp_path / "truth.json"]
    flags += ["--output-dir", tmp_path / "out", "--device", "cpu"]
    console = run("evaluate.py", *flags, processes=processes).stdout
    assert "Scoring 36 detections" in console
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())

    expected = pycocotools_stats(tmp_path / "truth.json", tmp_path / "results.json")
    assert [-1 if metrics[name] is None else metrics[name] for name in scoring.METRICS] == expected
    assert metrics["per_class"]["absent"] == {"AP": None, "AP50": None, "boxes": 0, "detections": 12}
    assert metrics["counts"] == {"images": 4, "boxes": 5, "detections": 36, "skipped": 0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["annotations", "metrics.json", "report.html"]


@pytest.mark.parametrize("keys", [("images", "categories"), ("images",)])
def test_a_list_of_images_is_detected_on(trained, data_path, tmp_path, capsys, keys):
    """As a test server gives it out, with nothing to score."""
    whole = json.loads((data_path / "annotations/instances_val2017.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps({key: whole[key] for key in keys}))
    flags = ["--val-images", data_path / "val2017", "--device", "cpu", "--workers", 0]

    def evaluate_on(annotations, output_dir, *more) -> list[dict]:
        command = ["--checkpoint", trained[0] / "checkpoint.pth", "--val-annotations", annotations, *flags, *more]
        arguments = [str(flag) for flag in [*command, "--output-dir", output_dir]]
        evaluate.main(evaluate.get_args_parser().parse_args(arguments))
        return json.loads((output_dir / "detections.json").read_text())

    (tmp_path / "list").mkdir()
    (tmp_path / "list/metrics.json").write_text("of an earlier evaluation")
    found = evaluate_on(tmp_path / "list.json", tmp_path / "list")
    assert "list.json has no annotations: nothing to score; the detections are in" in capsys.readouterr().out
    assert not (tmp_path / "list/metrics.json").exists()
    assert found == evaluate_on(data_path / "annotations/instances_val2017.json", tmp_path / "whole")
    for flag in (["--pictures", 1], ["--val-loss"]):
        with pytest.raises(ValueError, match="has no annotations, which --val-loss and --pictures need"):
            evaluate_on(tmp_path / "list.json", tmp_path / "list", *flag)
    weights = tmp_path / "weights.pth"
    torch.save(load(trained[0] / "checkpoint.pth")["model"], weights)
    command = ["--checkpoint", weights, "--model", "ssd300_resnet18", "--val-annotations", tmp_path / "list.json"]
    arguments = [str(flag) for flag in [*command, *flags, "--output-dir", tmp_path / "bare"]]
    if "categories" not in keys:
        with pytest.raises(ValueError, match=r"lists no categories, and .*weights\.pth does not tell which it knows"):
            evaluate.main(evaluate.get_args_parser().parse_args(arguments))


def test_lists_of_images_are_neither_trained_on_nor_scored(data_path, tmp_path):
    whole = json.loads((data_path / "annotations/instances_val2017.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps({key: whole[key] for key in ("images", "categories")}))
    for name in ("train", "val"):
        flags = ["--data-path", data_path, f"--{name}-annotations", tmp_path / "list.json", "--output-dir", tmp_path]
        with pytest.raises(ValueError, match=r"list\.json: has no list of annotations; evaluate\.py --checkpoint can"):
            train.main(train.parse_args([*SMALL, *map(str, flags)]))
    (tmp_path / "detections.json").write_text("[]")
    flags = ["--detections", tmp_path / "detections.json", "--val-annotations", tmp_path / "list.json"]
    with pytest.raises(ValueError, match=r"list\.json: has no list of annotations"):
        evaluate.main(evaluate.get_args_parser().parse_args([*map(str, flags), "--output-dir", str(tmp_path)]))


class Killed(BaseException):
    """As SIGKILL, but that the test goes on."""


@pytest.mark.parametrize(("fails", "written"), [("score", {"detections"}), ("describe", {"detections", "metrics"})])
def test_what_is_known_is_written_before_what_comes_next(trained, data_path, tmp_path, monkeypatch, fails, written):
    """Detections before they are scored, and scores before they are printed; a new start may go on with either."""

    def kill(*_):
        raise Killed

    command = [str(part) for part in evaluation_of(trained, data_path, tmp_path / "killed")[1:]]
    with monkeypatch.context() as patch:
        patch.setattr(inference, fails, kill)
        with pytest.raises(Killed):
            evaluate.main(evaluate.get_args_parser().parse_args(command))
    assert {path.stem for path in (tmp_path / "killed").glob("*.json")} == written
    evaluate.main(evaluate.get_args_parser().parse_args([*command[:-1], str(tmp_path / "whole")]))
    detections = str(tmp_path / "killed/detections.json")
    flags = ["--detections", detections, *command[2:-1], str(tmp_path / "again")]
    evaluate.main(evaluate.get_args_parser().parse_args(flags))
    whole, again = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "again"))
    assert whole == again


def test_names_that_the_console_cannot_show(run, data_path, tmp_path, monkeypatch):
    """In all that a run and its evaluations print."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    copy = tmp_path / "data"
    shutil.copytree(data_path, copy)
    for path in (copy / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "猫"
        path.write_text(json.dumps(content))
    flags = ["--data-path", copy, "--workers", 0, "--output-dir", tmp_path]
    assert "Classes (6): ?, square" in run("train.py", *SMALL, *flags, "--max-steps", 1).stdout
    checkpoint = ["--checkpoint", tmp_path / "checkpoint.pth", "--device", "cpu"]
    assert "\n?" in run("evaluate.py", *checkpoint, *flags).stdout
    (tmp_path / "猫.jpg").write_bytes(next((copy / "val2017").iterdir()).read_bytes())
    assert "?.jpg: " in run("evaluate.py", *checkpoint, *flags, "--images", tmp_path / "猫.jpg").stdout
    assert {one["file_name"] for one in json.loads((tmp_path / "detections.json").read_text())} == {"猫.jpg"}


def make_noise_data(root) -> None:
    """Photographs of noise, on which no two default boxes see the same and get tied scores; with COCO's annotations."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images = []
    for image_id, (height, width) in enumerate([(240, 320), (333, 250), (300, 300)], start=1):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"val2017/{image_id}.jpg", quality=95)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width})
    content = {"images": images, "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(1, 7)]}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))


def count_missing(found: np.ndarray, expected: np.ndarray) -> int:
    """How many ``expected`` rows of label, box and score are not ``found``, but for rounding in float32.

    That makes boxes of 300 pixels differ by 1e-4 and scores by 3e-6, where it is most; two that are not the same one
    differ by some pixels.
    """
    difference = np.abs(found[:, None] - expected[None])
    same = (difference <= (0, *[0.02] * 4, 1e-4)).all(axis=2)
    return int((same.sum(axis=0) != 1).sum())


def test_weights_of_torchvision_give_its_detections(tmp_path):
    """A state dict saved by torchvision, on the same JPEG files; test_model.py shows equality in float64.

    In float32 rounding may decide which of two boxes suppresses the other, or which is the last of the best 200.
    """
    make_noise_data(tmp_path)
    torch.manual_seed(3)
    theirs = torchvision_ssd300_vgg16(weights=None, weights_backbone=None, num_classes=7).eval()
    with torch.no_grad():
        for conv in theirs.head.classification_head.module_list:
            conv.weight *= 0.1  # scores between 0 and 1 instead of ties at both ends
    torch.save(theirs.state_dict(), tmp_path / "torchvision.pth")
    evaluate.main(
        evaluate.get_args_parser().parse_args(
            f"--checkpoint {tmp_path}/torchvision.pth --data-path {tmp_path} --device cpu --workers 0 -b 2 "
            f"--output-dir {tmp_path}".split()
        )
    )
    found = json.loads((tmp_path / "detections.json").read_text())
    a = coco.read_annotations(tmp_path / "annotations/instances_val2017.json")
    for row, image_id in enumerate(a.image_ids.tolist()):
        image = to_tensor(coco.load_image(a, tmp_path / "val2017", row)[..., :3])
        with torch.no_grad():
            (expected,) = theirs([image])
        assert len(expected["labels"]) > 100
        ours = [result for result in found if result["image_id"] == image_id]
        boxes = np.array([result["bbox"] for result in ours])
        boxes[:, 2:] += boxes[:, :2]
        scores, labels = ([result[key] for result in ours] for key in ("score", "category_id"))
        rows = np.column_stack([labels, boxes, scores])
        reference = np.column_stack([expected[key].double() for key in ("labels", "boxes", "scores")])
        may_flip = len(reference) // 50
        assert count_missing(rows, reference) <= may_flip
        assert count_missing(reference, rows) <= may_flip


def train_steps(data_path, output_dir, *flags) -> dict:
    """Trains in this process without evaluation, and returns the checkpoint."""
    arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--epochs", 3, "--output-dir", output_dir, *flags]
    train.main(train.parse_args([str(argument) for argument in arguments]))
    return load(output_dir / "checkpoint.pth")


@pytest.fixture(scope="module")
def five_steps(data_path, tmp_path_factory):
    return train_steps(data_path, tmp_path_factory.mktemp("five"), "--max-steps", 5, "--workers", 0)


def test_weights_do_not_depend_on_the_number_of_workers(data_path, five_steps, tmp_path):
    assert_equal_training(train_steps(data_path, tmp_path, "--max-steps", 5, "--workers", 2), five_steps)


def test_the_learning_curve_is_there_without_evaluation_and_where_a_run_ends_within_an_epoch(data_path, tmp_path):
    train_steps(data_path, tmp_path, "--max-steps", 1, "--workers", 0)
    assert (tmp_path / "pictures/learning_curve.png").stat().st_size > 1000


@pytest.mark.parametrize("stop", [1, STEPS_PER_EPOCH])
def test_a_resumed_run_equals_an_undisturbed_one(data_path, five_steps, tmp_path, stop):
    stopped = train_steps(data_path, tmp_path, "--max-steps", stop, "--workers", 2, "--resume", "auto")
    assert steps_done(stopped) == stop
    assert_equal_training(
        train_steps(data_path, tmp_path, "--max-steps", 5, "--workers", 0, "--resume", "auto"), five_steps
    )


def test_checkpoints_within_an_epoch(data_path, five_steps, tmp_path, monkeypatch):
    """A run that dies in its fourth step goes on from the checkpoint after two, and logs no step twice."""
    update = train.TrainingState.optimizer_step

    def dies_in_the_fourth(state):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return update(state)

    monkeypatch.setattr(train.TrainingState, "optimizer_step", dies_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_steps(data_path, tmp_path, "--checkpoint-freq", 2, "--workers", 0, "--print-freq", 1)
    monkeypatch.undo()
    assert steps_done(load(tmp_path / "checkpoint.pth")) == 2
    flags = ["--max-steps", 5, "--workers", 0, "--resume", "auto", "--print-freq", 1]
    assert_equal_training(train_steps(data_path, tmp_path, *flags), five_steps)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_run_without_resume_sets_the_files_of_an_earlier_one_aside(data_path, tmp_path, capsys):
    (tmp_path / "report.html").touch()
    for steps in (1, 2, 1):
        train_steps(data_path, tmp_path, "--max-steps", steps, "--workers", 0)
    console = capsys.readouterr().out
    assert f"{tmp_path} held files that this run does not continue, now in {tmp_path / 'previous-3'}: " in console
    found = [steps_done(load(tmp_path / name / "checkpoint.pth")) for name in ("previous-2", "previous-3", "")]
    assert found == [1, 2, 1]
    assert (tmp_path / "previous-1/report.html").exists()
    assert (tmp_path / "previous-2/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [("pictures", Path.touch, "File exists"), ("report.html", Path.mkdir, "Is a directory")],
)
def test_a_resumed_run_tries_where_its_pictures_and_its_report_will_go(data_path, tmp_path, name, block, reason):
    train_steps(data_path, tmp_path, "--max-steps", 1, "--workers", 0)
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    block(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: cannot be written \({reason}\)"):
        train_steps(data_path, tmp_path, "--max-steps", 2, "--workers", 0, "--resume", "auto")


def test_an_evaluation_that_an_interruption_prevented_is_made_up_for(data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "infer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_steps(data_path, tmp_path, "--epochs", 1, "--eval-freq", 1, "--workers", 0)
    assert not (tmp_path / "best.pth").exists()
    monkeypatch.undo()
    resumed = train_steps(data_path, tmp_path, "--epochs", 1, "--eval-freq", 1, "--workers", 0, "--resume", "auto")
    assert resumed["evaluated_step"] == STEPS_PER_EPOCH
    assert (tmp_path / "best.pth").exists()


def test_changed_learning_rates_take_effect_on_resume(data_path, tmp_path):
    train_steps(data_path, tmp_path, "--max-steps", 2, "--workers", 0)
    flags = ["--max-steps", 4, "--workers", 0, "--resume", "auto", "--lr", 0.004, "--lr-steps", 1]
    checkpoint = train_steps(data_path, tmp_path, *flags)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.004 * 0.1)


def test_torchvisions_command_runs_on_two_processes(run, data_path, tmp_path):
    command = (
        "train.py --dataset coco --model ssd300_vgg16 --epochs 120 --lr-steps 80 110 --aspect-ratio-group-factor 3 "
        "--lr 0.002 --batch-size 4 --weight-decay 0.0005 --data-augmentation ssd --weights-backbone none"
    )
    flags = ["--device", "cpu", "--data-path", data_path, "--max-steps", 1, "--workers", 0, "--output-dir", tmp_path]
    console = run(*command.split(), *flags, processes=2).stdout
    assert "--aspect-ratio-group-factor has no effect" in console
    assert "global batch of 8 (2 x 4 images)" in console
    assert console.count("Average Precision") == 6  # one table, from one process
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert checkpoint["args"]["world_size"] == 2
    torchvision_ssd300_vgg16(weights=None, weights_backbone=None, num_classes=7).load_state_dict(checkpoint["model"])


@pytest.fixture
def one_thread():
    """The rounding of processes under torchrun, which have one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_average_their_gradients(run, data_path, tmp_path):
    """A step equals that of one process whose loss is the mean of both halves of the batch."""
    flags = ["--data-path", data_path, "--eval-freq", 0, "--workers", 0, "--lr", 2.0]  # 0.002 at the start of warm-up
    run("train.py", *SMALL, *flags, "--max-steps", 1, "--output-dir", tmp_path, processes=2)
    distributed = load(tmp_path / "checkpoint.pth")["model"]

    args = train.parse_args([str(flag) for flag in [*SMALL, *flags]])
    torch.manual_seed(args.seed)
    a = coco.read_annotations(data_path / "annotations/instances_train2017.json")
    model = train.make_model(args, torch.device("cpu"), a.num_classes).train()
    preset = train.DetectionPresetTrain(data_augmentation="ssd", size=300)
    dataset = coco_utils.CocoTrainDataset(a, data_path / "train2017", preset, args.seed)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train.make_optimizer(args, model)
    factor = train.make_schedule(args, steps_per_epoch=len(dataset) // 6)
    optimizer.param_groups[0]["lr"] *= factor(0)
    for rank in range(2):
        keys = next(iter(coco_utils.EpochBatchSampler(len(dataset), 3, args.seed, rank, 2)))
        batch = coco_utils.collate([dataset[key] for key in keys])
        losses = model.compute_loss(model(preset.on_device(batch)), *coco_utils.split_objects(batch["objects"]))
        (sum(losses.values()) / 2).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(distributed[name], parameter.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(distributed[name], initial[name]), name


def test_fewer_processes_that_accumulate_take_the_same_steps(run, data_path, tmp_path, monkeypatch):
    """As four processes of one image do. Batch norm's averages differ, since there the main process keeps its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun has it: other sums of rounding errors make other ReLUs
    command = [
        "-m",
        "tests.tiny",
        *TINY[:-1],
        1,
        "--data-path",
        data_path,
        "--eval-freq",
        0,
        "--workers",
        0,
        "--lr",
        2.0,
    ]
    models = []
    for processes, flags in ((4, []), (2, ["--accumulate", 2]), (1, ["--accumulate", 4])):
        output_dir = tmp_path / str(processes)
        run(*command, *flags, "--max-steps", 1, "--output-dir", output_dir, processes=processes)
        checkpoint = load(output_dir / "checkpoint.pth")
        assert checkpoint["lr_scheduler"]["last_epoch"] == 1
        models.append(checkpoint["model"])
    four, *fewer = models
    torch.manual_seed(0)
    initial = MODEL(num_classes=7).state_dict()
    for name in (name for name in four if "running" not in name and "num_batches" not in name):
        change = (four[name] - initial[name]).abs().max()
        for model in fewer:
            error = (model[name] - four[name]).abs().max()
            assert error < 1e-3 * change, (name, error, change)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_processes_take_the_steps_of_plain_ones(run, data_path, tmp_path):
    """Of a tiny model; that those of the family compile as a whole, test_train.py shows."""
    command = ["-m", "tests.tiny", *TINY[:-1], 2, "--data-path", data_path, "--eval-freq", 0, "--workers", 0]
    command += ["--accumulate", 2, "--max-steps", 2, "--print-freq", 1]
    losses = []
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        console = run(*command, *extra, "--output-dir", tmp_path / name, processes=2).stdout
        assert ("Compiling" in console) == bool(extra)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


BATCH_NORM_SCRIPT = """
import torch
import utils

utils.init_distributed("cpu", timeout=60)
norm = torch.nn.BatchNorm1d(2)
norm(torch.randn(8, 2) + 10 * utils.rank())
before, _ = utils.gather_to_main(norm.running_mean.clone()) or (None, None)
utils.broadcast_buffers(norm)
after = utils.gather_to_main(norm.running_mean)
if utils.is_main():
    assert torch.equal(after[0], before) and torch.equal(after[1], before), (before, after)
    print("equal", before.tolist())
utils.cleanup_distributed()
"""


def test_processes_get_the_main_ones_batch_norm(run, tmp_path):
    """Batch norm has seen other images in each process, but only the main one's is saved."""
    (tmp_path / "script.py").write_text(BATCH_NORM_SCRIPT)
    assert "equal" in run(tmp_path / "script.py", processes=2).stdout


@pytest.mark.parametrize("flags", [[], ["--ema", 0.5]], ids=["", "average"])
def test_batch_norm_is_made_equal_before_every_evaluation(data_path, tmp_path, monkeypatch, flags):
    calls = []
    monkeypatch.setattr(utils, "broadcast_buffers", lambda model: calls.append(("broadcast", id(model))))
    monkeypatch.setattr(inference, "infer", lambda model, *_, **__: calls.append(("evaluate", id(model))))
    train_steps(data_path, tmp_path, "--epochs", 2, "--eval-freq", 1, "--workers", 0, *flags)
    assert [name for name, _ in calls] == ["broadcast", "evaluate"] * 2
    assert len({model for _, model in calls}) == 1


AVERAGE_SCRIPT = """
import sys
import torch
import train
import utils
from engine import inference
from ssd import family
from tests.tiny import MODEL


def compare(model, *_, **__):
    averages = utils.gather(model.state_dict())
    for name, average in averages[0].items():
        assert torch.equal(averages[1][name], average), name
    sys.stdout.write("equal\\n")


family.MODELS["tiny"] = MODEL
inference.infer = compare
train.main(train.parse_args(sys.argv[1:]))
"""


def test_processes_evaluate_the_same_average(run, data_path, tmp_path):
    """Statistics of batch norm included, which each process has averaged of its own."""
    (tmp_path / "script.py").write_text(AVERAGE_SCRIPT)
    arguments = [*TINY, "--data-path", data_path, "--epochs", 1, "--workers", 0, "--ema", 0.5, "--output-dir", tmp_path]
    console = run(tmp_path / "script.py", *arguments, processes=2).stdout
    assert console.count("equal\n") == 2


def test_test_only_evaluates(run, trained, data_path, tmp_path):
    command = ["train.py", "--test-only", "--resume", trained[0] / "best.pth", "--data-path", data_path]
    console = run(*command, "--device", "cpu", "--workers", 0, "--output-dir", tmp_path).stdout
    assert "Average Precision" in console
    assert (tmp_path / "evaluation/metrics.json").exists()  # what the training has written stays
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


def test_custom_layout(data_path, tmp_path):
    arguments = [*SMALL, "--max-steps", 1, "--eval-freq", 0, "--workers", 0, "--output-dir", tmp_path]
    for split in ("train", "val"):
        arguments += [f"--{split}-images", data_path / f"{split}2017"]
        arguments += [f"--{split}-annotations", data_path / f"annotations/instances_{split}2017.json"]
    train.main(train.parse_args([str(argument) for argument in arguments]))
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_users_mistake_is_one_line(run, tmp_path):
    result = run("train.py", *SMALL, "--data-path", tmp_path / "nowhere", "--output-dir", tmp_path, fails=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith(f"train.py: error: {tmp_path}/nowhere: no such folder; --data-path is the folder of a data set")
    )


def test_a_mistake_ends_all_processes(run, data_path, tmp_path):
    command = ["evaluate.py", "--checkpoint", tmp_path / "nowhere.pth", "--data-path", data_path, "--device", "cpu"]
    result = run(*command, "--output-dir", tmp_path, processes=2, fails=True)
    assert f"evaluate.py: error: {tmp_path}/nowhere.pth: no such checkpoint file" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data-path is missing"),
        (["--data-path", "{data}", "--batch-size", 99], "do not fill 1 batch.* of 99"),
        (["--data-path", "{data}", "--resume", "nowhere.pth"], r"nowhere\.pth: no such checkpoint file"),
        (["--data-path", "{data}", "--weights", "nowhere.pth"], r"nowhere\.pth: no such checkpoint file"),
        (["--data-path", "{data}", "--trainable-backbone-layers", 9], "must be 0 to 5, got 9"),
        (["--test-only"], "--test-only needs --resume or --weights"),
    ],
)
def test_mistakes_in_flags(data_path, tmp_path, flags, message):
    flags = [str(flag).format(data=data_path) for flag in flags]
    args = train.parse_args([*SMALL, "--output-dir", str(tmp_path), "--workers", "0", *flags])
    with pytest.raises(ValueError, match=message):
        (evaluate.evaluate_as_trained if args.test_only else train.main)(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 1], "--seed 0, this run has 1"),
        (["--batch-size", 4], "--batch-size 3, this run has 4"),
        (["--model", "ssd300_vgg16"], "--model ssd300_resnet18, this run has ssd300_vgg16"),
        (["--opt", "adamw"], "--opt sgd, this run has adamw"),
        (["--weight-decay", 0.1], "--weight-decay 0.0005, this run has 0.1"),
        (["--trainable-backbone-layers", 2], "--trainable-backbone-layers 5, this run has 2"),
    ],
)
def test_resume_refuses_flags_that_would_change_the_run(data_path, trained, tmp_path, flags, message):
    flags = ["--resume", trained[0] / "checkpoint.pth", *flags]
    with pytest.raises(ValueError, match=message):
        train_steps(data_path, tmp_path, *flags)


def test_other_classes_than_the_checkpoints(data_path, trained, tmp_path):
    content = json.loads((data_path / "annotations/instances_val2017.json").read_text())
    content["categories"][3]["name"] = "comet"
    (tmp_path / "other.json").write_text(json.dumps(content))
    a = coco.read_annotations(tmp_path / "other.json")
    checkpoint = str(trained[0] / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"different classes: only .*checkpoint\.pth has 'star' as category 4"):
        checkpoints.check_knows(*checkpoints.load_model(checkpoint, None), checkpoint, a)


def test_resume_refuses_other_data(trained, data_path, tmp_path):
    content = json.loads((data_path / "annotations/instances_train2017.json").read_text())
    last = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != last]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    flags = ["--resume", trained[0] / "checkpoint.pth", "--train-annotations", tmp_path / "fewer.json"]
    with pytest.raises(ValueError, match=r"fewer\.json: has 11 images to train on, the checkpoint to resume 12"):
        train_steps(data_path, tmp_path, *flags)


def test_broken_weights_are_no_perfect_detector(data_path, tmp_path):
    """COCO's API takes a box of NaN for a match; such a model must not get a score."""
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7)
    model.head.regression_head.module_list[0].bias.data.fill_(float("nan"))
    a = coco.read_annotations(data_path / "annotations/instances_val2017.json")
    args = train.parse_args(["--device", "cpu", "--batch-size", "2", "--workers", "0"])
    with pytest.raises(FloatingPointError, match=r"not finite on images \[1, 2\]"):
        infer(args, model, a, data_path / "val2017")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(data_path, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the (loss \w+ is (nan|inf)|weight \S+ is no longer finite)"):
        train_steps(data_path, tmp_path, "--lr", 1e30, "--epochs", 3, "--workers", 0)
    path = tmp_path / "checkpoint.pth"
    assert not path.exists() or all(value.isfinite().all() for value in load(path)["model"].values())


def test_learning_rate_schedule():
    args = train.parse_args(["--epochs", "120"])
    factor = train.make_schedule(args, steps_per_epoch=3664)
    assert factor(0) == pytest.approx(1 / 1000)
    assert factor(500) == pytest.approx(0.5005)
    assert [factor(3664 * epoch) for epoch in (1, 79, 80, 109, 110, 119)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factor(1000) == 1
    one_batch = train.make_schedule(args, steps_per_epoch=1)
    assert [one_batch(step) for step in (0, 79, 80)] == pytest.approx([1, 1, 0.1])
    cosine = train.make_schedule(train.parse_args(["--epochs", "4", "--lr-scheduler", "cosineannealinglr"]), 10)
    assert [cosine(10 * epoch) for epoch in (1, 2, 3)] == pytest.approx([0.853553, 0.5, 0.146447], abs=1e-6)


def test_warm_up_equals_the_references(monkeypatch):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=min(1000, 60 - 1))
    factor = train.make_schedule(train.parse_args([]), steps_per_epoch=60)
    for step in range(60):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


def test_warm_up_in_steps_goes_over_epochs():
    factor = train.make_schedule(train.parse_args(["--lr-warmup-steps", "100", "--lr-steps", "7", "30"]), 20)
    assert [factor(step) for step in (0, 50, 99, 100, 139)] == pytest.approx([0.001, 0.5005, 0.99001, 1, 1])
    assert [factor(step) for step in (140, 600)] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize(("steps", "fits"), [(39, True), (40, False), (41, False)])
def test_a_warm_up_in_steps_that_does_not_end_is_an_error(steps, fits):
    args = train.parse_args(["--lr-warmup-steps", str(steps), "--epochs", "20"])
    if fits:
        assert train.make_schedule(args, steps_per_epoch=2)(39) == 1
    else:
        with pytest.raises(ValueError, match=f"{steps} steps does not end in 20 epochs of 2: raise --epochs, or lower"):
            train.make_schedule(args, steps_per_epoch=2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recipe", "small"], (None, 100)),
        (["--recipe", "small", "--lr-warmup-epochs", "3"], (3, None)),
        (["--recipe", "small", "--lr-warmup-steps", "0"], (None, 0)),
        (["--recipe", "large_batch"], (5, None)),
        (["--recipe", "large_batch", "--lr-warmup-steps", "70"], (None, 70)),
        ([], (None, None)),
    ],
)
def test_a_warm_up_on_the_command_line_takes_the_place_of_the_recipes(flags, expected):
    args = train.parse_args(flags)
    assert (args.lr_warmup_epochs, args.lr_warmup_steps) == expected
