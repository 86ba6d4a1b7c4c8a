"""Training that begins with a whole model's weights, and the flags that go with it, through train.py."""

import json
import re

import pytest
import torch
from torch import nn

import evaluate
import ssd
import train
import utils
from coco import scoring
from engine import checkpoints, optimization, summary
from tests.conftest import SMALL
from tests.ssd.test_vgg_weights import features_of

NUM_HEAD_TENSORS = 12  # of the classification head: weights and biases for six feature maps


@pytest.fixture(scope="module")
def coco_checkpoint(tmp_path_factory):
    """As of a run on COCO's 91 classes."""
    torch.manual_seed(7)
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, input_scaling="caffe")
    path = tmp_path_factory.mktemp("coco") / "coco.pth"
    arguments = {"model": "ssd300_resnet18", "input_scaling": model.input_scaling}
    ssd.save_file({"model": model.state_dict(), "args": arguments, "version": ssd.VERSION}, path)
    return path


@pytest.fixture
def train_steps(data_path, tmp_path):
    """Trains in this process, and returns the checkpoint."""

    def run(*flags, steps: int = 2) -> dict:
        arguments = [*SMALL, "--data-path", data_path, "--eval-freq", 0, "--max-steps", steps, "--workers", 0]
        train.main(train.parse_args([str(part) for part in (*arguments, "--output-dir", tmp_path, *flags)]))
        return torch.load(tmp_path / "checkpoint.pth", weights_only=True)

    return run


def test_a_run_keeps_what_fits_and_names_what_begins_anew(train_steps, coco_checkpoint, capsys):
    trained = train_steps("--weights", coco_checkpoint, "--lr", 1e-9)
    console = capsys.readouterr().out
    line = re.search(rf"Kept from {coco_checkpoint}: all weights but .* for 7 classes \(.*\): (.*)", console)
    anew = line[1].split(", ")
    assert len(anew) == NUM_HEAD_TENSORS
    assert all(name.startswith("head.classification_head.") for name in anew)
    before = torch.load(coco_checkpoint, weights_only=True)["model"]
    for name in before.keys() - set(anew):
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(trained["model"][name], before[name], rtol=0, atol=1e-5)
    assert trained["args"]["input_scaling"] == "caffe"  # of the checkpoint; this model's own is ImageNet's
    assert "input scaling caffe" in console


def test_the_same_number_of_classes_keeps_all_and_says_so(train_steps, tmp_path, capsys):
    """Where the run continues, its own checkpoint counts."""
    weights = tmp_path / "seven.pth"
    torch.save(ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7).state_dict(), weights)
    train_steps("--weights", weights)
    assert f"Kept from {weights}: all weights, for 7 classes" in capsys.readouterr().out
    train_steps("--weights", weights, "--resume", "auto", steps=3)
    assert "Kept from" not in capsys.readouterr().out


def test_a_frozen_backbone_stays_as_it_was(train_steps, coco_checkpoint, capsys, tmp_path):
    """Its extra layers and the statistics of batch norm included; also where the run is continued."""
    before = torch.load(coco_checkpoint, weights_only=True)["model"]
    flags = ["--recipe", "caffe"]  # where all layers train by default
    flags += ["--weights", coco_checkpoint, "--freeze-backbone", "--lr", 0.01, "--eval-freq", 1]
    for steps in (2, 4):
        trained = train_steps(*flags, "--resume", "auto", steps=steps)["model"]
        for name, value in before.items():
            if name.startswith("backbone."):
                assert torch.equal(trained[name], value), name
        assert not torch.equal(
            trained["head.regression_head.module_list.0.bias"], before["head.regression_head.module_list.0.bias"]
        )
    console = capsys.readouterr().out
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7)
    trainable = sum(parameter.numel() for parameter in model.head.parameters())
    assert console.count(f"of which {trainable:,} train") == 2
    assert "Changed since" in console
    assert "trainable" not in "".join(line for line in console.splitlines() if "Changed since" in line)
    assert checkpoints.load_model(str(tmp_path / "checkpoint.pth"), None)[0].input_scaling == "caffe"


def test_a_recipe_does_not_scale_what_was_trained_otherwise(train_steps, coco_checkpoint):
    with pytest.raises(ValueError, match="input scaling caffe, not imagenet; use --input-scaling caffe"):
        train_steps("--recipe", "baseline", "--weights", coco_checkpoint)


def test_a_state_dict_is_evaluated_with_the_scaling_that_is_named(data_path, tmp_path, coco_checkpoint, capsys):
    """It gives the detections of the checkpoint, which knows; by evaluate.py, and by train.py --test-only."""
    state_dict = torch.load(coco_checkpoint, weights_only=True)["model"]
    torch.save(state_dict, tmp_path / "bare.pth")
    flags = ["--dataset", "shapes", "--data-path", data_path, "--workers", 0, "--device", "cpu", "--batch-size", 4]
    models = {}
    for name, source, more in (
        ("told", coco_checkpoint, []),
        ("named", tmp_path / "bare.pth", ["--input-scaling", "caffe"]),
        ("default", tmp_path / "bare.pth", []),
    ):
        arguments = ["--checkpoint", source, "--model", "ssd300_resnet18", *flags, *more]
        args = evaluate.get_args_parser().parse_args([str(part) for part in arguments])
        models[name] = evaluate.open_model(args, torch.device("cpu"))[0].input_scaling
    assert models == {"told": "caffe", "named": "caffe", "default": "imagenet"}
    seven = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7)
    torch.save(seven.state_dict(), tmp_path / "seven.pth")
    found = []
    for scaling in ("imagenet", "caffe"):
        arguments = ["--test-only", "--weights", tmp_path / "seven.pth", "--model", "ssd300_resnet18", *flags]
        arguments += ["--input-scaling", scaling, "--output-dir", tmp_path / scaling]
        evaluate.evaluate_as_trained(train.parse_args([str(part) for part in arguments]))
        found.append((tmp_path / scaling / "evaluation/detections.json").read_text())
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "args", [None, {}, {"model": "ssd9000"}, {"model": ["ssd300_resnet18"]}, ["ssd300_resnet18"]], ids=str
)
def test_a_checkpoint_of_an_unknown_model(tmp_path, args):
    state_dict = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=2).state_dict()
    content = {"model": state_dict, "categories": [], "version": ssd.VERSION, "args": args}
    ssd.save_file(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd.pth: (is of a model that is not known|not the weights of this model)"):
        checkpoints.load_model(str(tmp_path / "odd.pth"), None)


@pytest.mark.parametrize("name", ["SSD300_VGG16_Weights.COCO_V1", "SSDLite320_MobileNet_V3_Large_Weights.COCO_V1"])
def test_torchvisions_weights_name_their_model(monkeypatch, name):
    built = []
    for model in ssd.family.MODELS:
        monkeypatch.setitem(ssd.family.MODELS, model, lambda model=model, **settings: built.append(model))
    checkpoints.load_model(name, None)
    assert built == [name.split("_Weights")[0].lower()]


@pytest.mark.parametrize("model", [None, "ssd300_resnet18"])
def test_a_file_of_torchvision_names_its_model_unless_a_flag_does(tmp_path, monkeypatch, model):
    built = []
    for name in ssd.family.MODELS:
        monkeypatch.setitem(ssd.family.MODELS, name, lambda name=name, **settings: built.append(name))
    path = tmp_path / "ssdlite320_mobilenet_v3_large_coco-a79551df.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    checkpoints.load_model(str(path), model)
    assert built == [model or "ssdlite320_mobilenet_v3_large"]
    path = path.rename(tmp_path / "vgg16-397923af.pth")
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth: is of a model that is not known here, 'vgg16'"):
        checkpoints.load_model(str(path), None)


def test_default_boxes_for_voc_through_training_resume_evaluation_and_fine_tuning(
    train_steps, data_path, tmp_path, capsys
):
    """The checkpoint remembers them, so that no later command names them; a bare state dict of it wants the flag."""
    flags = ["--recipe", "voc", "--model", "ssd300_vgg11", "--batch-size", 2]  # of which SMALL has others
    trained = train_steps(*flags, steps=1)
    assert trained["args"]["default_boxes"] == "voc"
    checkpoint = tmp_path / "checkpoint.pth"
    resumed = train_steps("--recipe", "caffe", *flags[2:], "--resume", "auto", steps=2)
    assert resumed["args"]["default_boxes"] == "voc"
    assert "default-boxes" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--default-boxes voc, this run has coco; they must agree"):
        train_steps(*flags, "--default-boxes", "coco", "--resume", "auto", steps=3)

    torch.save(resumed["model"], tmp_path / "bare.pth")

    def evaluated(source, *more) -> tuple[str, str]:
        arguments = ["--checkpoint", source, "--data-path", data_path, "--workers", 0, "--device", "cpu", *more]
        arguments += ["--output-dir", tmp_path / "evaluation"]
        evaluate.main(evaluate.get_args_parser().parse_args([str(part) for part in arguments]))
        return (tmp_path / "evaluation/detections.json").read_text(), capsys.readouterr().out

    expected, console = evaluated(checkpoint)
    assert "assumed" not in console
    bare = ["--model", "ssd300_vgg11"]
    assert evaluated(tmp_path / "bare.pth", *bare, "--default-boxes", "voc")[0] == expected
    other, console = evaluated(tmp_path / "bare.pth", *bare)
    assert other != expected
    for what, value in (("input scaling", "imagenet"), ("default boxes", "coco")):
        line = f"{tmp_path}/bare.pth: does not tell its {what}; {value} is assumed (--{what.replace(' ', '-')})"
        assert line in console.splitlines()

    train_steps(*flags[2:], "--weights", checkpoint, "--output-dir", tmp_path / "tuned", steps=1)
    assert torch.load(tmp_path / "tuned/checkpoint.pth", weights_only=True)["args"]["default_boxes"] == "voc"
    with pytest.raises(ValueError, match="trained with default boxes voc, not coco; use --default-boxes voc"):
        train_steps(*flags[2:], "--weights", checkpoint, "--default-boxes", "coco", steps=1)


def test_training_says_what_it_assumes_of_weights(train_steps, tmp_path, capsys):
    """And that a recipe has nothing to subsample; on a network without fc6 and fc7, that a flag has no effect."""
    path = tmp_path / "my.pth"
    torch.save(features_of("vgg11"), path)
    train_steps("--recipe", "caffe", "--model", "ssd300_vgg11", "--batch-size", 1, "--weights-backbone", path, steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}: does not tell its input scaling; imagenet is assumed (--input-scaling)" in lines
    assert f"{path}: has no classifier to subsample; fc6 and fc7 begin anew" in lines
    train_steps("--subsample-fc", "--output-dir", tmp_path / "other", steps=1)
    assert "--subsample-fc has no effect: ssd300_resnet18 has no fc6 and fc7" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--weights", "none"]])
def test_a_frozen_backbone_needs_weights(train_steps, flags):
    with pytest.raises(ValueError, match="--freeze-backbone needs --weights"):
        train_steps("--freeze-backbone", *flags)


def test_flags_that_freeze_differently_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--freeze-backbone", "--trainable-backbone-layers", "3"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert train.parse_args(["--recipe", "caffe", "--freeze-backbone"]).freeze_backbone


def test_scaled_learning_rate(train_steps, capsys):
    """Of the recipe for 32 images, for 2 x 3."""
    trained = train_steps("--scale-lr", "--accumulate", 2, "--lr-warmup-epochs", 0)
    expected = 0.002 * 6 / 32
    assert trained["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected)
    assert trained["args"]["lr"] == 0.002
    console = capsys.readouterr().out
    assert "Learning rate 0.000375 = 0.002 x 0.1875 (--scale-lr) for a global batch of 6 (1 x 3 images x 2)" in console
    train_steps("--scale-lr", "--accumulate", 2, "--lr-warmup-epochs", 0, "--resume", "auto", steps=3)
    assert "--lr " not in "".join(line for line in capsys.readouterr().out.splitlines() if "Changed since" in line)


@pytest.mark.parametrize("flag", ["--lr-warmup-epochs", "--lr-warmup-steps"])
def test_a_warm_up_that_does_not_end_is_an_error(flag):
    args = train.parse_args(["--epochs", "5", flag, "5"])
    args.world_size = 1
    with pytest.raises(ValueError, match=f"does not end in 5 epochs of 1: raise --epochs, or lower {flag}$"):
        train.make_schedule(args, steps_per_epoch=1)


def test_batch_norm_has_its_own_weight_decay():
    """All parameters train, each in one group; with no decay of their own in a single one."""
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None)
    args = train.parse_args(["--norm-weight-decay", "0", "--weight-decay", "0.1"])
    others, norms = train.make_optimizer(args, model).param_groups
    assert (others["weight_decay"], norms["weight_decay"]) == (0.1, 0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    assert {names[parameter] for parameter in norms["params"]} == expected
    assert {names[parameter] for parameter in others["params"]} == set(names.values()) - expected
    (group,) = train.make_optimizer(train.parse_args([]), model).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_weight_decay_of_batch_norm_through_training_and_resume(train_steps):
    flags = ["--norm-weight-decay", 0, "--lr", 1e-3]
    train_steps(*flags, steps=1)
    groups = train_steps(*flags, "--resume", "auto", steps=2)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0]


def test_flags_without_effect_say_so():
    args = train.parse_args(["--norm-weight-decay", "0", "--sync-bn", "--subsample-fc"])
    args.world_size = 1
    model = ssd.get_model("ssd300_vgg11", weights_backbone=None)

    def lines(**has) -> list[str]:
        return list(summary.describe_flags(vars(args), args.lr, **has))

    *norm, _ = lines(has_norm=False, has_fc=True)
    assert norm == [
        f"{flag} has no effect: ssd300_vgg16 has no batch norm" for flag in ("--sync-bn", "--norm-weight-decay")
    ]
    *fc, _ = lines(has_norm=True, has_fc=False)
    assert fc == ["--subsample-fc has no effect: ssd300_vgg16 has no fc6 and fc7"]
    assert len(lines(has_norm=True, has_fc=True)) == 1
    assert len(train.make_optimizer(args, model).param_groups[1]["params"]) == 0


def test_synchronised_batch_norm_needs_gpus(train_steps):
    with pytest.raises(ValueError, match="--sync-bn needs GPUs"):
        train_steps("--sync-bn")
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    keys = model.state_dict().keys()
    converted = utils.synchronise_batch_norm(model, torch.device("cuda"))
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules()) == norms
    assert converted.state_dict().keys() == keys
    assert len(optimization.norm_layers(converted)) == norms


def test_batch_norm_of_one_value_is_explained(run, data_path, tmp_path):
    flags = ["--model", "ssdlite320_mobilenet_v3_large", "--data-path", data_path, "--output-dir", tmp_path]
    result = run("train.py", *flags, "--batch-size", 1, "--max-steps", 1, "--workers", 0, fails=True)
    assert "batch norm needs a --batch-size of 2 or more" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("ssd512_resnet18", "lr_scheme"), ("ssd300_vgg11_bn", "caffe"), ("ssdlite320_mobilenet_v3_large", "ssdlite")],
)
def test_members_and_recipes_through_the_scripts(data_path, tmp_path, capsys, model, recipe):
    """Trained, continued and evaluated, with the same figures as those of the run."""

    def run(script, *arguments) -> str:
        parse = train.parse_args if script is train else evaluate.get_args_parser().parse_args
        script.main(parse([str(argument) for argument in arguments]))
        return capsys.readouterr().out

    flags = ["--recipe", recipe, "--model", model, "--weights-backbone", "none", "--batch-size", 2, "--workers", 0]
    flags += ["--data-path", data_path, "--output-dir", tmp_path, "--device", "cpu", "--resume", "auto"]
    run(train, *flags, "--max-steps", 1, "--eval-freq", 0)
    assert "Continuing after 1 steps" in run(train, *flags, "--max-steps", 2)
    checkpoint, output_dir = tmp_path / "checkpoint.pth", tmp_path / "evaluation"
    # in the batches of the run, which are computed alike
    flags = ["--data-path", data_path, "--workers", 0, "--device", "cpu", "--batch-size", 2, "--output-dir", output_dir]
    console = run(evaluate, "--checkpoint", checkpoint, *flags)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert scoring.format_table(metrics) in console
    in_training = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: metrics[name] for name in scoring.METRICS} == pytest.approx(
        {name: in_training[name] for name in scoring.METRICS}, abs=1e-12
    )
    assert metrics["counts"]["detections"] > 0
