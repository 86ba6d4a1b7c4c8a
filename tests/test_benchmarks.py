"""What measures: right where it computes, and ready to run where there is a GPU."""

import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg

import coco
import evaluate
import ssd
import train
from benchmarks import coco_like, device_profile, export, on_gpu, side_by_side, torchvision_training, train_step
from benchmarks.device_profile import Interval
from benchmarks.turns import Variants


def test_the_run_for_a_gpu_is_rehearsed(run, tmp_path):
    """Every step, in miniature: nothing of it meets its first error where time on a GPU is counted."""
    console = run("-m", "benchmarks.on_gpu", "--rehearse", "--output-dir", tmp_path, timeout=3000).stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == []
    assert json.loads(console.splitlines()[-1]) == {key: report[key] for key in report if key != "results"}
    expected = on_gpu.list_steps(on_gpu.MINIATURE, tmp_path, "none", "")
    assert [result["step"] for result in report["results"]] == [step.name for step in expected]
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    results = {result["step"]: result for result in report["results"]}
    assert {result["step"]: result for result in written} == results  # those, as they came
    figures = {step: result["figures"] for step, result in results.items()}
    assert figures["step"]["batches"]["1"]["ratios"].keys() == {"ours fp32 eager / peer fp32"}
    assert figures["levers, large batch"]["batches"]["2"]["variants"].keys() == {
        "ours fp32 eager",
        "ours fp32 eager + separate-heads",
        "ours fp32 eager + pooled-convs",
        "ours fp32 eager + benchmark-limit-0",
    }
    assert "Done: 3 steps" in (tmp_path / "log.txt").read_text()


def test_the_full_run_has_the_same_steps_and_no_flag_that_the_rehearsal_does_not_try(tmp_path):
    full, miniature = (on_gpu.list_steps(scale, tmp_path, "none", "") for scale in (on_gpu.FULL, on_gpu.MINIATURE))
    assert [step.name.split(", batch")[0] for step in full] == [step.name.split(", batch")[0] for step in miniature]
    for one, other in zip(full, miniature, strict=True):
        tried, wanted = (set(re.findall(r" (--[a-z-]+)", step.command)) for step in (other, one))
        assert wanted - tried <= {"--amp", "--compile", "--at-once"}, one.name


def test_a_step_ends_at_its_limit_with_all_that_it_started_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    (tmp_path / "quick.py").write_text("print('{\"value\": 3}')\nprint('{\"value\"')")
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(f'{{\"child\": {child.pid}}}', flush=True)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "broken.py").write_text("raise SystemExit('no luck')")
    begin = time.monotonic()
    steps = [on_gpu.Step(name, 5, f"{name}.py") for name in ("quick", "slow", "broken")]
    results = [on_gpu.run_step(step, tmp_path, {}, step.limit) for step in steps]
    assert time.monotonic() - begin < 60
    assert [result["outcome"] for result in results] == ["ok", "ended after 5 s", "exit code 1"]
    assert results[0]["figures"] == {"value": 3}
    child = results[1]["figures"]["child"]
    deadline = time.monotonic() + 30
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert results[2]["last lines"] == ["no luck"]
    assert "no luck" in (tmp_path / "log.txt").read_text()
    assert "ended after 5 s" in on_gpu.table(results)
    assert "KeyboardInterrupt" in (tmp_path / "log.txt").read_text()  # it was asked first


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_profile_says_how_busy_the_device_was_and_where_it_stood_still():
    kernels = [
        Interval("convolution", 100, 150),
        Interval("pool", 151, 161),  # follows at once
        Interval("copy", 155, 175),  # beside it
        Interval("convolution", 195, 200),
    ]
    calls = ["cudaLaunchKernel", "cudaStreamSynchronize", "cudaStreamSynchronize", "cudaMalloc", "aten::conv2d"]
    found = device_profile.summary(kernels, calls, num_steps=2)
    assert found["busy_share"] == pytest.approx((50 + 24 + 5) / 100)
    assert found["kernels_per_step"] == 2
    assert (found["gaps_per_step"], found["gap_ms_per_step"]) == (0.5, pytest.approx(0.01))
    assert found["host_calls_per_step"] == {"cudaStreamSynchronize": 1, "cudaMalloc": 0.5}
    assert [one["name"] for one in found["heaviest"]] == ["convolution", "copy", "pool"]
    assert found["heaviest"][0] == {"name": "convolution", "ms": 0.0275, "calls": 1, "share": pytest.approx(55 / 85)}
    assert "busy 79.0 %" in device_profile.as_text(found)


@pytest.mark.parametrize(("size", "ceil_mode"), [((8, 6), False), ((9, 7), False), ((9, 7), True), ((1, 1), True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_pooled_convolution_is_what_its_layers_are_in_their_order(size, ceil_mode, dtype):
    """Values to the last bit, since a rounded sum grows with its larger part; gradients, where no two are equal."""
    torch.manual_seed(0)
    conv, pool = torch.nn.Conv2d(3, 8, 3, padding=1, dtype=dtype), torch.nn.MaxPool2d(2, stride=2, ceil_mode=ceil_mode)
    pooled = train_step.PooledConv(conv, pool)
    assert dict(pooled.named_parameters()).keys() == {"weight", "bias"}
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    without_bias = torch.nn.functional.conv2d(x, conv.weight, None, padding=1)
    expected = pool((without_bias + conv.bias.view(-1, 1, 1)).relu())
    outputs = pooled(x)
    assert torch.equal(outputs, expected)
    if dtype == torch.float64:
        parameters = [x, conv.weight, conv.bias]
        gradients = [torch.autograd.grad(one.square().sum(), parameters) for one in (outputs, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_early_pools_change_no_prediction():
    model = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=3).eval()
    images = 255 * torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        expected = model(images)
        keys = model.state_dict().keys()
        train_step.pool_early(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == keys
    assert [type(layer).__name__ for layer in model.backbone.features].count("PooledConv") == 3


def fail_or_not(fails: bool) -> None:
    if fails:
        raise MemoryError("too large")


def nothing() -> int:
    return 1


def test_a_variant_that_cannot_start_takes_no_turns(capfd):
    with Variants(fail_or_not, {"sound": (False,), "large": (True,)}, at_once=2) as variants:
        assert variants.take_turns(nothing, rounds=2) == {"sound": [1, 1]}
    assert list(variants.failed) == ["large"]
    assert "large failed to start: too large" in capfd.readouterr().err


def test_drawn_files_are_used_again(tmp_path):
    coco_like.draw_coco_like_data(tmp_path, num_files=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "train2017").iterdir()}
    coco_like.draw_coco_like_data(tmp_path, num_files=3, num_images=7)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "train2017").iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()
    annotations = coco.read_annotations(tmp_path / "annotations/instances_train2017.json")
    assert len(annotations.image_ids) == 7
    assert annotations.num_classes == 91
    assert max(annotations.offsets[1:] - annotations.offsets[:-1]) == coco_like.MAX_BOXES


def test_the_references_training_writes_what_ours_does(run, data_path, tmp_path):
    """From the same files, weights and flags: its metrics can be laid beside ours."""
    layers = vgg.make_layers(vgg.cfgs["D"])
    weights = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(weights | {"classifier.0.bias": torch.full((4096,), torch.nan)}, tmp_path / "vgg16.pth")
    command = ["-m", "benchmarks.torchvision_training", "--data-path", data_path, "--workers", 0, "--batch-size", 3]
    command += ["--weights-backbone", tmp_path / "vgg16.pth", "--output-dir", tmp_path, "--lr", 1e-4]
    console = run(*command, "--epochs", 2, "--eval-freq", 1, "--opt", "adamw").stdout
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(one["kind"], one.get("step")) for one in records] == [
        ("train", 4),
        ("val", 4),
        ("train", 8),
        ("val", 8),
        ("end", None),
    ]
    assert records[2]["loss"] < records[0]["loss"]
    assert json.loads(console.splitlines()[-1])["seconds"] == records[-1]["seconds"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "ssd512_vgg16"],
        ["--model", "ssd300_resnet18", "--weights-backbone", "resnet18.pth"],
        ["--recipe", "finetune"],
        ["--data-augmentation", "hflip"],
        ["--accumulate", "2"],
        ["--max-steps", "5"],
        ["--freeze-backbone", "--weights", "none"],
        ["--recipe", "ssdlite"],
        ["--weights-backbone", "default"],
    ],
)
def test_the_references_side_refuses_what_would_be_another_training(flags):
    args = train.parse_args(["--weights-backbone", "none", *flags])
    with pytest.raises(SystemExit, match="--"):
        torchvision_training.refuse_other_trainings(args)
    torchvision_training.refuse_other_trainings(train.parse_args(["--weights-backbone", "none", "--recipe", "small"]))


def test_the_references_train_on_images_with_a_box_of_some_size_be_it_a_crowd(tmp_path):
    boxes = {
        1: [[0, 0, 9, 9, 0]],
        2: [[0, 0, 9, 1, 0]],
        3: [],
        4: [[0, 0, 9, 9, 1]],
        5: [[0, 0, 1, 1, 0], [1, 1, 2, 3, 0]],
    }
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in boxes],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "category_id": 7, "bbox": box[:4], "area": 1, "iscrowd": box[4]}
            for i, ones in boxes.items()
            for k, box in enumerate(ones)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    for i in boxes:
        Image.new("RGB", (20, 10)).save(tmp_path / f"{i}.png")
    training_set = torchvision_training.TrainingSet(tmp_path, tmp_path / "instances.json")
    assert training_set.ids == [1, 4, 5]
    assert training_set.load(1)[1].shape == (0, 4)
    assert training_set.load(2)[1].tolist() == [[0, 0, 1, 1], [1, 1, 3, 4]]
    image, target = training_set[0]
    assert image.dtype == torch.float32
    assert target["labels"].unique().tolist() == [7]


def test_a_collapse_is_looked_at_in_miniature(run, data_path, tmp_path):
    command = ["-m", "benchmarks.collapse", "--data-path", data_path, "--weights-backbone", "none", "--steps", 2]
    command += ["--every", 1, "--picture", tmp_path / "c.png", "--output-dir", tmp_path, "--input-scaling", "caffe"]
    variants = ["activations x 0.1", "fc6 and fc7 fixed"]
    report = json.loads(run(*command, "--only", *variants).stdout.splitlines()[-1])
    assert list(report["variants"]) == variants
    shrunk, fixed = report["variants"].values()
    assert [one["step"] for one in shrunk] == [0, 1, 2]
    place = report["measures"].index("deviation over an image")
    before = [one[0]["layers"]["conv5_3"][place] for one in (shrunk, fixed)]
    assert before[0] == pytest.approx(0.1 * before[1], rel=1e-3)
    place = report["measures"].index("norm of the weights")
    weights = [[one["layers"][layer][place] for one in fixed] for layer in ("fc7", "conv5_3")]
    assert weights[0][0] == weights[0][2]
    assert weights[1][0] != weights[1][2]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 1000


def test_torchvisions_ssd_takes_our_resnet():
    """The weights of our model fit, and both then predict the same of the same default boxes."""
    ours = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7).eval()
    theirs = torchvision_training.make_model("ssd300_resnet18", "none", num_classes=7).eval()
    state_dict = {name.replace("backbone.", "backbone.backbone.", 1): one for name, one in ours.state_dict().items()}
    theirs.load_state_dict(state_dict)
    images = torch.rand(2, 3, 300, 300)
    with torch.no_grad():
        found = ours.postprocess_detections(ours(255 * images), torch.tensor([[300, 300]] * 2))
        for one, other in zip(found, theirs(list(images)), strict=True):
            assert len(one["scores"]) > 100
            torch.testing.assert_close(one["scores"][:100], other["scores"][:100], rtol=1e-3, atol=1e-4)


def test_learning_curves_of_both_sides_are_drawn_with_any_number_of_seeds(tmp_path):
    one = {"losses": [(1, 9.0), (2, 5.0)], "curve": [(2, 0.1, 0.2)]}
    for results in ({"ours": [one], "torchvision": []}, {"ours": [one, one], "torchvision": [one]}):
        picture = side_by_side.draw(results)
        assert picture.shape[0] == 3
        assert picture.float().std() > 1


def test_a_side_is_summed_up_from_its_log(tmp_path, monkeypatch):
    records = [
        {"kind": "train", "step": 3, "epoch": 0, "loss": 9.0},
        {"kind": "train", "step": 4, "epoch": 0, "loss": 7.0},
        {"kind": "val", "step": 4, "epoch": 0, "AP": 0.1, "AP50": 0.3},
        {"kind": "train", "step": 8, "epoch": 1, "loss": 5.0},
        {"kind": "val", "step": 8, "epoch": 1, "AP": 0.2, "AP50": 0.4},
    ]

    def write(command, **_) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--output-dir") + 1])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", write)
    found = side_by_side.run("ours", 1, tmp_path, ["--batch-size", "3"])
    assert (found["AP"], found["AP50"]) == (0.2, 0.4)
    assert (found["losses"], found["curve"]) == ([(1, 8.5), (2, 5.0)], [(1, 0.1, 0.3), (2, 0.2, 0.4)])
    assert found["images/s"] * found["seconds"] == pytest.approx(8 * 3)


def test_the_quick_comparison_is_one_that_both_sides_can_make():
    args = train.parse_args(side_by_side.QUICK)
    torchvision_training.refuse_other_trainings(args)
    assert (args.dataset, args.model, args.data_augmentation) == ("shapes", "ssd300_resnet18", "ssd")


def test_sides_are_compared_by_the_means_of_their_seeds():
    ours = side_by_side.summary([{"AP": ap, "AP50": 2 * ap, "seconds": 10, "images/s": 2} for ap in (0.2, 0.3, 0.4)])
    theirs = side_by_side.summary([{"AP": ap, "AP50": 2 * ap, "seconds": 25, "images/s": 1} for ap in (0.1, 0.2, 0.3)])
    error = 0.1 / 3**0.5
    assert ours["AP50"] == pytest.approx(0.6)
    assert ours["standard error of AP"] == pytest.approx(error)
    assert side_by_side.compare(ours, theirs) == pytest.approx(
        {"difference of AP": 0.1, "times as long": 2.5, "standard error of the difference": error * 2**0.5}
    )
    alone = side_by_side.summary([{"AP": 0.2, "AP50": 0.3, "seconds": 1, "images/s": 9}])
    assert "standard error of the difference" not in side_by_side.compare(alone, theirs)


def test_detections_of_an_exported_file_are_compared_with_the_nearest_of_their_class():
    expected = np.array([[1, 10, 10, 20, 20, 0.9, 3], [1, 10, 10, 20, 20, 0.8, 4], [2, 0, 0, 5, 5, 0.5, 3]])
    same = {"box difference": 0, "score difference": 0, "without like": 0}
    assert export.compare(expected, expected) == export.compare(expected[::-1], expected) == same
    found = expected + np.array([[0, 0, 0.25, 0, 0, 0, 0], [0, 0, 0, 0, 0, -0.125, 0], [0] * 7])
    assert export.compare(found, expected) == {"box difference": 0.25, "score difference": 0.125, "without like": 0}
    assert export.compare(found[:2], expected)["without like"] == 1
    assert export.compare(np.concatenate((expected, [[3, 0, 0, 5, 5, 0.5, 3]])), expected)["without like"] == 1
    assert export.compare(expected[:0], expected)["without like"] == 3
    far = expected + np.array([0, 5, 0, 0, 0, 0, 0])
    assert export.compare(far, expected)["without like"] == 6


def test_exported_files_detect_what_pytorch_does_in_the_benchmark(data_path, tmp_path):
    model = ssd.get_model("ssd300_light", weights_backbone=None, num_classes=7)
    ssd.save_file({"model": model.state_dict()}, tmp_path / "model.pth")
    flags = ["--checkpoint", tmp_path / "model.pth", "--model", "ssd300_light", "--data-path", data_path]
    args = evaluate.get_args_parser().parse_args([str(flag) for flag in [*flags, "--output-dir", tmp_path]])
    found = {}
    for name, variant in export.export_all(args, tmp_path).items():
        export.start(variant)
        seconds, found[name] = export.measure()
        assert seconds > 0
    assert len(found) == 5
    for detections in found.values():
        assert len(detections) == 7 * 200
    for name in ("detections.pt2", "raw.pt2"):
        assert export.compare(found[name], found[export.PYTORCH])["without like"] < 10
