"""Each recipe builds what it names, and differs from the one before in that alone."""

import bisect
import math
import re

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum

import presets
import ssd
import train

STEPS_PER_EPOCH = 2000
STUDY = ["baseline", "paper_hyperparams", "data_augmentation", "weight_init_and_input_scaling", "lr_scheme"]


@pytest.fixture(scope="module")
def built():
    """What a recipe makes of a run of 8 processes, by its name."""
    loaded = []

    shapes = {"0.weight": (4096, 512 * 7 * 7), "0.bias": (4096,), "3.weight": (4096, 4096), "3.bias": (4096,)}
    classifier = {f"classifier.{name}": torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}

    def random_weights(self, **_) -> dict:
        loaded.append(str(self))
        if "SSD" in str(self):
            return ssd.get_model("ssd300_vgg16", weights_backbone=None).state_dict()
        layers = nn.Sequential(*ssd.backbones.vgg.make_layers(ssd.backbones.vgg.cfgs["D"]))
        return {f"features.{name}": value for name, value in layers.state_dict().items()} | classifier

    def build(name: str) -> dict:
        loaded.clear()
        args = train.parse_args(["--recipe", name])
        args.world_size = 8
        model = train.make_model(args, torch.device("cpu"), num_classes=91)
        optimizer = train.make_optimizer(args, model)
        (group,) = optimizer.param_groups
        factor = train.make_schedule(args, STEPS_PER_EPOCH)
        preset = presets.DetectionPresetTrain(data_augmentation=args.data_augmentation, size=model.size)
        return {
            "size and boxes": (model.size, len(model.default_boxes)),
            "side of the smallest box": (model.default_boxes[0, 2] - model.default_boxes[0, 0]).item() / model.size,
            "fc7 from the classifier": torch.equal(
                model.state_dict().get("backbone.extra.0.7.3.bias", torch.zeros(0)), torch.full((1024,), 0.5)
            ),
            "weights": list(loaded),
            "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
            "scaling": (model.image_mean.flatten().tolist(), model.image_std.flatten().tolist()),
            "init": [weight_init(layer) for layer in new_layers(model)],
            "augmentation": [
                (type(one).__name__, constants(one)) for one in (*preset.geometric, preset.photometric) if one
            ],
            "optimizer": (type(optimizer), group.get("momentum"), group.get("nesterov")),
            "weight decay": group["weight_decay"],
            "images per step": args.batch_size * args.world_size * args.accumulate,
            "rates": [group["lr"] * factor(epoch * STEPS_PER_EPOCH + 1500) for epoch in range(args.epochs)],
        }

    torch.manual_seed(0)  # whichever tests came before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", random_weights)
        yield {name: build(name) for name in presets.RECIPES}


def constants(transform) -> dict:
    return vars(transform) | ({"ranges": transform.RANGES} if hasattr(transform, "RANGES") else {})


def new_layers(model: ssd.SSD) -> list[nn.Conv2d]:
    """A large layer of each part that SSD adds: of the backbone, and of both heads."""
    added = model.backbone.extra if hasattr(model.backbone, "extra") else model.backbone.features
    heads = (model.head.classification_head, model.head.regression_head)
    return [
        max((layer for layer in part.modules() if isinstance(layer, nn.Conv2d)), key=lambda layer: layer.weight.numel())
        for part in (added[-1], *heads)
    ]


def weight_init(layer: nn.Conv2d) -> str:
    """What it was initialised by, from its biases and the spread of its weights."""
    size = layer.kernel_size[0] ** 2
    fan_in, fan_out = layer.in_channels * size, layer.out_channels * size
    xavier = math.sqrt(2 / (fan_in + fan_out))
    deviations = {"xavier": xavier, "small": 0.1 * xavier, "pytorch": math.sqrt(1 / (3 * fan_in)), "normal": 0.03}
    name = min(deviations, key=lambda name: abs(deviations[name] - layer.weight.std().item()))
    assert layer.weight.std().item() == pytest.approx(deviations[name], rel=0.02)
    assert layer.bias is None or bool(layer.bias.any()) == (name == "pytorch")
    return name


def differences(one: dict, other: dict) -> set[str]:
    return {key for key in one if one[key] != other[key]}


def multi_step(epochs: int, lr: float, milestones: list[int]) -> list[float]:
    return [lr * 0.1 ** bisect.bisect_right(milestones, epoch) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("baseline", "paper_hyperparams", {"images per step", "weight decay", "rates"}),
        ("paper_hyperparams", "data_augmentation", {"augmentation"}),
        ("data_augmentation", "weight_init_and_input_scaling", {"weights", "scaling", "init"}),
        ("weight_init_and_input_scaling", "lr_scheme", {"rates"}),
        ("lr_scheme", "two_thirds", {"rates"}),
        ("lr_scheme", "caffe", {"augmentation", "rates", "frozen", "fc7 from the classifier"}),
        ("caffe", "voc", {"rates", "side of the smallest box"}),
        ("lr_scheme", "large_batch", {"images per step", "rates"}),
        ("small", "finetune", {"weights", "rates", "init"}),
    ],
)
def test_neighbours_differ_in_what_the_step_names_alone(built, before, after, expected):
    assert differences(built[before], built[after]) == expected


@pytest.mark.parametrize(
    ("name", "batch", "weight_decay", "rates"),
    [
        ("baseline", 16, 1e-4, multi_step(26, 0.02, [16, 22])),
        ("paper_hyperparams", 32, 5e-4, multi_step(65, 0.001, [44, 55])),
        ("data_augmentation", 32, 5e-4, multi_step(65, 0.001, [44, 55])),
        ("weight_init_and_input_scaling", 32, 5e-4, multi_step(65, 0.001, [44, 55])),
        ("lr_scheme", 32, 5e-4, multi_step(120, 0.002, [80, 110])),
        ("two_thirds", 32, 5e-4, multi_step(80, 0.002, [53, 73])),
        ("caffe", 32, 5e-4, multi_step(109, 0.001, [76, 98])),
        ("voc", 32, 5e-4, multi_step(232, 0.001, [155, 193])),
    ],
)
def test_optimizer_and_schedule(built, name, batch, weight_decay, rates):
    assert built[name]["optimizer"] == (torch.optim.SGD, 0.9, False)
    assert (built[name]["images per step"], built[name]["weight decay"]) == (batch, weight_decay)
    assert built[name]["rates"] == pytest.approx(rates)


def test_the_schedule_of_voc_is_the_papers_in_steps():
    """Of 32 of the 16,551 images of 07+12 trainval, to within half an epoch."""
    values, steps_per_epoch = presets.RECIPES["voc"].values, 16_551 // 32
    steps = [epochs * steps_per_epoch for epochs in (*values["lr_steps"], values["epochs"])]
    assert steps == pytest.approx([80_000, 100_000, 120_000], abs=steps_per_epoch / 2)
    assert values["tuned_for_batch"] == 8 * values["batch_size"] == 32


def test_large_batch_scales_the_rate_and_rises_to_it_over_five_epochs(built):
    """8 times the 32 images that 0.002 is for. The rates are those after three quarters of each epoch."""
    rates, target = built["large_batch"]["rates"], 0.002 * 256 / 32
    assert built["large_batch"]["images per step"] == 256
    rising = [target * (0.001 + 0.999 * (epoch + 0.75) / 5) for epoch in range(5)]
    assert rates == pytest.approx(rising + multi_step(120, target, [80, 110])[5:])


def test_the_rate_of_ssdlite_is_a_cosine(built):
    rates = built["ssdlite"]["rates"]
    assert len(rates) == 660
    assert built["ssdlite"]["images per step"] == 192
    assert (rates[0], rates[330]) == pytest.approx((0.15, 0.075))
    assert 0 < rates[-1] < 1e-5
    assert built["ssdlite"]["weight decay"] == 4e-5


def test_models_and_inputs(built):
    torchvision, caffe = ["VGG16_Weights.IMAGENET1K_V1"], ["VGG16_Weights.IMAGENET1K_FEATURES"]
    conv1 = [f"backbone.features.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    transforms = {name: [kind for kind, _ in one["augmentation"]] for name, one in built.items()}
    for name in STUDY:
        is_late = name in STUDY[3:]
        assert built[name]["size and boxes"] == (300, 8732)
        assert built[name]["frozen"] == conv1
        assert built[name]["weights"] == (caffe if is_late else torchvision)
        assert built[name]["init"] == ["xavier" if is_late else "pytorch"] * 3
        mean, std = built[name]["scaling"]
        assert mean == pytest.approx([123, 117, 104] if is_late else [123.675, 116.28, 103.53], abs=0.01)
        assert std == pytest.approx([1, 1, 1] if is_late else [58.395, 57.12, 57.375])
    for name in STUDY[:2]:
        assert transforms[name] == ["RandomHorizontalFlip"]
    geometric = ["RandomZoomOut", "RandomIoUCrop", "RandomHorizontalFlip"]
    for name in STUDY[2:]:
        assert transforms[name] == [*geometric, "RandomPhotometricDistort"]
    assert transforms["caffe"] == [geometric[0], "CaffeIoUCrop", geometric[2], "CaffePhotometricDistort"]
    assert built["caffe"]["frozen"] == built["voc"]["frozen"] == []
    assert built["caffe"]["side of the smallest box"] == pytest.approx(0.07)
    assert built["voc"]["side of the smallest box"] == pytest.approx(0.1)
    assert transforms["ssdlite"] == ["RandomIoUCrop", "RandomHorizontalFlip"]
    assert built["ssdlite"]["init"] == ["normal"] * 3
    assert built["ssdlite"]["size and boxes"] == (320, 3234)
    assert built["ssdlite"]["weights"] == []
    assert transforms["demo"] == ["RandomHorizontalFlip"]


def test_constants_of_the_transforms(built):
    """Those of a pipeline by themselves are shown elsewhere; these are the defaults that recipes take."""
    (_, zoom_out), (_, crop), (_, flip), (_, distort) = built["lr_scheme"]["augmentation"]
    assert zoom_out == {"max_ratio": 4.0, "p": 0.5}
    assert crop["min_ious"] == (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    assert (crop["min_scale"], crop["max_aspect_ratio"], crop["trials"]) == (0.3, 2.0, 40)
    assert flip == {"p": 0.5}
    assert distort["p"] == 0.5
    assert distort["ranges"] == {
        "brightness": (0.875, 1.0, 1.125),
        "contrast": (0.5, 1.0, 1.5),
        "saturation": (0.5, 1.0, 1.5),
        "hue": (-0.05, 0.0, 0.05),
    }
    (_, zoom_out), (_, crop), (_, flip), (_, distort) = built["caffe"]["augmentation"]
    assert zoom_out == {"max_ratio": 4.0, "p": 0.5}
    assert set(crop["min_ious"]) == {0.0, 0.1, 0.3, 0.5, 0.7, 0.9}
    assert (crop["min_scale"], crop["max_aspect_ratio"], crop["trials"]) == (0.3, 2.0, 50)
    assert (flip, distort["p"]) == ({"p": 0.5}, 0.5)
    assert distort["ranges"] == {
        "brightness": (-32, 0, 32),
        "contrast": (0.5, 1.0, 1.5),
        "saturation": (0.5, 1.0, 1.5),
        "hue": (-0.1, 0.0, 0.1),
    }


def test_the_published_recipes_are_what_they_were_to_the_last_digit():
    """Each number that trains, as written in the study: no recipe for other ends may move one of them."""
    common = {"opt": "sgd", "momentum": 0.9, "lr_gamma": 0.1, "lr_scheduler": "multisteplr", "model": "ssd300_vgg16"}
    old = {"weights_backbone": "VGG16_Weights.IMAGENET1K_V1", "input_scaling": "imagenet", "weight_init": "pytorch"}
    new = dict.fromkeys(old, "default")
    paper = {"batch_size": 4, "epochs": 65, "lr": 0.001, "weight_decay": 5e-4, "lr_steps": [44, 55]}
    expected = {
        "baseline": old | {"batch_size": 2, "epochs": 26, "lr": 0.02, "weight_decay": 1e-4, "lr_steps": [16, 22]},
        "paper_hyperparams": old | paper | {"data_augmentation": "hflip"},
        "data_augmentation": old | paper | {"data_augmentation": "ssd"},
        "weight_init_and_input_scaling": new | paper | {"data_augmentation": "ssd"},
        "lr_scheme": new | paper | {"epochs": 120, "lr": 0.002, "lr_steps": [80, 110], "data_augmentation": "ssd"},
    }
    assert list(expected) == STUDY
    for name, values in expected.items():
        args = train.parse_args(["--recipe", name])
        assert vars(args).items() >= (common | values).items()
        assert (args.scale_lr, args.lr_warmup_steps, args.lr_warmup_epochs) == (False, None, None)
        assert (args.epoch_samples, args.accumulate) == (0, 1)
        args.world_size = 8
        factor = train.make_schedule(args, 3664)
        rates = [train.base_lr(args) * factor(step) for step in (0, 500, 1000, 3664 * values["lr_steps"][0])]
        lr = values["lr"]
        assert rates == [lr * 0.001, lr * (0.001 + (1 - 0.001) * 500 / 1000), lr, lr * 0.1]


@pytest.mark.parametrize(("batch", "factor"), [(8, 1.0), (2, 0.5), (32, 2.0), (64, 8**0.5)])
def test_recipes_for_few_images_fit_rate_and_warm_up_to_the_batch(batch, factor):
    """By the root of its size, for AdamW; the warm-up has as many images."""
    for recipe in ("small", "finetune"):
        args = train.parse_args(["--recipe", recipe, "--batch-size", str(batch)])
        args.world_size = 1
        assert train.base_lr(args) == pytest.approx(1e-4 * factor)
        schedule = train.make_schedule(args, steps_per_epoch=200)
        warmup_steps = math.ceil(100 * 8 / batch)
        assert schedule(warmup_steps - 1) < 1.0 == schedule(warmup_steps)
    args = train.parse_args(["--recipe", "small", "--opt", "sgd", "--batch-size", str(batch)])
    args.world_size = 2
    assert train.base_lr(args) == pytest.approx(1e-4 * 2 * batch / 8)


def test_small_begins_with_small_predictions(built):
    assert built["small"]["init"] == ["xavier", "small", "small"]
    assert differences(built["small"], built["lr_scheme"]) == {
        "init",
        "optimizer",
        "images per step",
        "rates",
    }


def test_the_demo_is_tuned_for_its_own_batch():
    args = train.parse_args(["--recipe", "demo"])
    assert (args.batch_size, args.tuned_for_batch, args.epochs, args.lr_steps) == (4, 4, 8, [6])
    assert (args.dataset, args.model, args.opt, args.lr) == ("shapes", "ssd300_light", "adamw", 0.001)


def test_the_list_has_every_recipe_with_its_published_map(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--recipe", "list"])
    assert stop.value.code == 0
    table = capsys.readouterr().out
    published = dict(re.findall(r"^(\w+) +(\d\d\.\d)  ", table, re.MULTILINE))
    assert published == dict(zip(STUDY, ["19.5", "21.1", "22.9", "23.9", "25.1"], strict=True)) | {
        "voc": "77.2",
        "ssdlite": "21.3",
    }
    assert "of voc by the paper, on VOC2007 test" in table
    assert set(re.findall(r"^(\w+) +(?:\d\d\.\d)?  ", table, re.MULTILINE)) == {"recipe", *presets.RECIPES}
    assert "--lr-steps 53 73" in table


@pytest.mark.parametrize(
    ("name", "based_on"),
    [
        *zip(STUDY[1:], STUDY, strict=False),
        ("two_thirds", "lr_scheme"),
        ("caffe", "lr_scheme"),
        ("voc", "caffe"),
        ("small", "lr_scheme"),
        ("finetune", "small"),
        ("large_batch", "lr_scheme"),
        ("baseline", "lr_scheme"),
        ("ssdlite", "lr_scheme"),
        ("demo", "lr_scheme"),
    ],
)
def test_flags_shown_by_the_list_make_a_recipe_of_its_neighbour(capsys, name, based_on):
    """What it prints under a name can be typed."""
    with pytest.raises(SystemExit):
        train.parse_args(["--recipe", "list"])
    shown = re.search(rf"^{name} .*\n((?: {{37}}.*\n)+)", capsys.readouterr().out, re.MULTILINE)[1].split()
    typed, named = (vars(train.parse_args(flags)) for flags in (["--recipe", based_on, *shown], ["--recipe", name]))
    assert {key for key in typed if typed[key] != named[key]} <= {"recipe", "tuned_for_batch"}


def test_what_a_recipe_turns_on_can_be_turned_off():
    assert train.parse_args(["--recipe", "large_batch"]).scale_lr
    assert not train.parse_args(["--recipe", "large_batch", "--no-scale-lr"]).scale_lr
    args = train.parse_args(["--recipe", "baseline", "--weights-backbone", "default", "--input-scaling", "default"])
    assert (args.weights_backbone, args.input_scaling) == ("default", "default")
