"""Every member of the family, those that torchvision has parts for against them as oracle."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model, mobilenet_v3_large
from torchvision.models.detection import ssd as torchvision_ssd
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.detection.ssdlite import _mobilenet_extractor

import ssd
import train
from ssd.family import build
from tests.conftest import float64, use_float64

NUM_CLASSES = 7
# all depths of VGG, and both sizes
VGGS = [name for name in ssd.family.MODELS if name.startswith("ssd300_vgg")] + ["ssd512_vgg11_bn", "ssd512_vgg16"]
BOXES = {
    300: {"aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2], [2]]}
    | {"scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05], "steps": [8, 16, 32, 64, 100, 300]},
    512: {"aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]]}
    | {"scales": [0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06], "steps": [8, 16, 32, 64, 128, 256, 512]},
}


def make(name: str, **settings) -> ssd.SSD:
    return ssd.get_model(name, **{"weights_backbone": None, "num_classes": NUM_CLASSES, **settings})


def test_a_name_that_no_model_has():
    with pytest.raises(ValueError, match=r"there is no model 'ssd300_VGG16'; .* ssd300_vgg16, "):
        make("ssd300_VGG16")


def torchvision_vgg(name: str) -> torchvision_ssd.SSD:
    """The same member, put together from torchvision's parts.

    torchvision's own layers for 512 pixels leave out the strides of conv10 and conv11, so that its maps have 6, 4 and 1
    cells where Caffe's have 4, 2 and 1 (24,732 default boxes instead of 24,564).
    """
    size, backbone = int(name[3:6]), name[7:]
    layers = get_model(backbone, weights=None, init_weights=False)
    extractor = torchvision_ssd._vgg_extractor(layers, highres=size == 512, trainable_layers=5)
    if size == 512:
        for block in extractor.extra[3:]:
            block[2].padding = (1, 1)
        for block in extractor.extra[3:5]:
            block[2].stride = (2, 2)
    mean, std = ssd.INPUT_SCALINGS["caffe" if backbone == "vgg16" else "imagenet"]
    boxes = TorchvisionGenerator(**BOXES[size])
    return torchvision_ssd.SSD(extractor, boxes, (size, size), NUM_CLASSES, image_mean=mean, image_std=std)


def targets_for(size: int) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Two boxes on each of two images, as torchvision wants them and as we do."""
    boxes = size * torch.tensor([[[0.1, 0.2, 0.5, 0.9], [0.5, 0.5, 0.6, 0.58]], [[0, 0, 1, 1], [0.3, 0.1, 0.9, 0.3]]])
    labels = torch.tensor([[1, 6], [3, 2]])
    return [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)], boxes, labels


def images_for(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 255


@pytest.fixture
def in_float64():
    """Where results are equal, or something is wrong: no rounding flips the order of scores or a limit."""
    with float64():
        yield


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("name", VGGS)
def test_vggs_equal_torchvisions(name):
    """The same weights, whatever their names and order, give the same feature maps and predictions."""
    theirs, ours = torchvision_vgg(name).eval(), make(name).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = images_for(ours.size)[:1]
    with torch.no_grad():
        outputs = ours(image)
        normalized, _ = theirs.transform([image[0] / 255])
        expected = theirs.head(list(theirs.backbone(normalized.tensors).values()))
    assert outputs["cls_logits"].shape[1] == {300: 8732, 512: 24564}[ours.size]
    for key, value in expected.items():
        assert_close(outputs[key], value)


@pytest.mark.usefixtures("in_float64")
def test_the_losses_and_detections_of_ssd512_equal_torchvisions():
    theirs, ours = torchvision_vgg("ssd512_vgg11"), make("ssd512_vgg11")
    use_float64(theirs.anchor_generator)
    with torch.no_grad():
        for conv in theirs.head.classification_head.module_list:
            conv.weight *= 0.3  # scores between 0 and 1 instead of tied at both
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = images_for(512)[:1]
    targets, boxes, labels = (both[:1] for both in targets_for(512))
    with torch.no_grad():
        expected_losses = theirs.train()(list(images / 255), targets)
        outputs = ours.eval()(images)
        expected = theirs.eval()(list(images / 255))
    for name, loss in ours.compute_loss(outputs, boxes, labels).items():
        assert_equal(loss, expected_losses[name])
    assert_same_detections(ours.postprocess_detections(outputs, torch.tensor([[512, 512]])), expected)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """In float64, where sums in another order differ by 1e-13 of the largest number, even after a hundred layers."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())


def assert_same_detections(detections: list[dict], expected: list[dict]) -> None:
    assert sum(len(one["labels"]) for one in expected) > 20
    for one, reference in zip(detections, expected, strict=True):
        assert torch.equal(one["labels"], reference["labels"])
        assert_equal(one["scores"], reference["scores"])
        assert_equal(one["boxes"], reference["boxes"])


@pytest.mark.usefixtures("in_float64")
def test_ssdlite_equals_torchvisions():
    """Strictly the same state dict; the same losses, statistics of batch norm, and detections."""
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    use_float64(theirs.anchor_generator)
    ours = make("ssdlite320_mobilenet_v3_large")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = images_for(320)
    targets, boxes, labels = targets_for(320)
    expected_losses = theirs.train()(list(images / 255), targets)
    for name, loss in ours.train().compute_loss(ours(images), boxes, labels).items():
        assert_equal(loss, expected_losses[name])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9)  # means of 0 are 1e-17
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # statistics of these images, without which they all look alike
    theirs(list(images / 255), targets)
    with torch.no_grad():
        for block in theirs.head.classification_head.module_list:
            block[1].weight *= 2  # scores that differ
        ours.load_state_dict(theirs.state_dict())
        expected = theirs.eval()(list(images / 255))
        detections = ours.eval().postprocess_detections(ours(images), torch.tensor([[320, 320]] * 2))
    assert_same_detections(detections, expected)
    for name in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_ssdlite_begins_as_torchvisions():
    """The same spread of random weights in every layer, and the same constants of batch norm."""
    ours = make("ssdlite320_mobilenet_v3_large")
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    for (name, value), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert value.requires_grad == reference.requires_grad
        if value.numel() > 500:
            assert value.std().item() == pytest.approx(reference.std().item(), rel=0.15, abs=1e-6), name
    norms = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (ours, theirs)]
    assert [(m.eps, m.momentum) for m in norms[0]] == [(m.eps, m.momentum) for m in norms[1]]


@pytest.mark.parametrize("trainable", range(7))
def test_freezing_of_ssdlite_equals_torchvisions(trainable):
    settings = {"weights_backbone": None, "num_classes": 2, "trainable_backbone_layers": trainable}
    ours = ssd.get_model("ssdlite320_mobilenet_v3_large", **settings)
    theirs = _mobilenet_extractor(mobilenet_v3_large(reduced_tail=True), trainable, nn.BatchNorm2d)
    assert [p.requires_grad for p in ours.backbone.parameters()] == [p.requires_grad for p in theirs.parameters()]


@pytest.mark.parametrize("name", ssd.list_models())
def test_every_member_trains_and_detects(name):
    """A step with the optimizer of train.py lowers the loss of two images, or of one large one."""
    model = make(name).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    images = images_for(model.size)[: 1 if model.size == 512 else 2]
    _, boxes, labels = targets_for(model.size)
    optimizer = train.make_optimizer(train.parse_args(["--opt", "adamw", "--lr", "1e-5"]), model)

    def total_loss() -> torch.Tensor:
        return sum(model.compute_loss(model(images), boxes[: len(images)], labels[: len(images)]).values())

    before = total_loss()
    before.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert total_loss() < before
        detections = model.eval().postprocess_detections(model(images[:1]), torch.tensor([[30, 60]]))
    assert len(detections[0]["boxes"]) > 0
    assert (detections[0]["boxes"] <= torch.tensor([60, 30, 60, 30])).all()


@pytest.mark.parametrize("name", ssd.list_models())
def test_misspelt_keyword_is_an_error(name):
    with torch.device("meta"), pytest.raises(TypeError, match="score_tresh"):
        make(name, score_tresh=0.1)


@pytest.mark.parametrize("name", ["ssd300_vgg11_bn", "ssd300_resnet18", "ssdlite320_mobilenet_v3_large"])
def test_batch_norm_that_is_frozen_keeps_its_statistics(name):
    """And that which is not changes them, whether evaluation came between or not."""
    model = make(name, trainable_backbone_layers=3)
    model.eval()
    model.train()
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    before = {name: layer.running_mean.clone() for name, layer in norms.items()}
    model(images_for(model.size))
    for layer_name, layer in norms.items():
        changed = not torch.equal(layer.running_mean, before[layer_name])
        assert changed == layer.weight.requires_grad, layer_name
    assert {layer.weight.requires_grad for layer in norms.values()} == {True, False}


class TwoConvolutions(nn.Module):
    """As small as the contract of a backbone allows."""

    out_channels = (4, 8)
    trainable_layers = 1

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, stride=8), nn.Conv2d(4, 8, 3, stride=4)])

    def forward(self, images):
        feature_maps = [self.convs[0](images)]
        return [*feature_maps, self.convs[1](feature_maps[0])]


def test_a_new_backbone_is_its_class_and_an_entry():
    backbone = ssd.backbones.Backbone(lambda weights, size, **settings: TwoConvolutions(), weights=None)
    model = build(backbone, 160, num_classes=3)
    assert len(model.default_boxes) == 6 * (20**2 + 5**2)
    _, boxes, labels = targets_for(160)
    losses = model.compute_loss(model(images_for(160)), boxes, labels.clamp(max=2))
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_new_layers_begin_as_named():
    """PyTorch's default differs from Xavier's by its bounds, and by biases."""
    for weight_init, bound, has_bias in (
        ("xavier", math.sqrt(6 / (9 * (512 + 1024))), False),
        ("pytorch", 1 / math.sqrt(9 * 512), True),
    ):
        model = make("ssd300_vgg11", weight_init=weight_init)
        fc6 = model.backbone.extra[0][-1][1]
        assert 0.99 * bound < fc6.weight.abs().max() <= bound
        assert bool(fc6.bias.abs().max() > 0) == has_bias
        assert bool(model.head.regression_head.module_list[0].bias.abs().max() > 0) == has_bias


@pytest.fixture(scope="module")
def coco_weights(tmp_path_factory):
    """A model of 91 classes, as a state dict."""
    path = tmp_path_factory.mktemp("coco") / "coco.pth"
    torch.save(make("ssd300_resnet18", num_classes=91).state_dict(), path)
    return path


def test_another_number_of_classes_keeps_all_but_the_scores(coco_weights):
    model = make("ssd300_resnet18", weights=str(coco_weights), num_classes=3)
    heads = [f"head.classification_head.module_list.{i}.{part}" for i in range(6) for part in ("weight", "bias")]
    assert model.initialised_anew == heads
    saved = torch.load(coco_weights, weights_only=True)
    for name, value in model.state_dict().items():
        assert (value.shape != saved[name].shape) if name in heads else torch.equal(value, saved[name])
    bias = model.head.classification_head.module_list[0].bias
    assert bias.shape == (4 * 3,)


def test_of_separable_heads_only_what_scores_classes_begins_anew(tmp_path):
    torch.save(make("ssdlite320_mobilenet_v3_large", num_classes=91).state_dict(), tmp_path / "coco.pth")
    model = make("ssdlite320_mobilenet_v3_large", weights=str(tmp_path / "coco.pth"), num_classes=3)
    scoring = [f"head.classification_head.module_list.{i}.1.{part}" for i in range(6) for part in ("weight", "bias")]
    assert model.initialised_anew == scoring


@pytest.mark.parametrize("settings", [{}, {"num_classes": 91}])
def test_the_same_number_of_classes_keeps_everything(coco_weights, settings):
    model = ssd.get_model("ssd300_resnet18", weights=str(coco_weights), **settings)
    assert model.num_classes == 91
    assert model.initialised_anew == []


@pytest.mark.parametrize("name", ["ssd512_resnet18", "ssd300_resnet34", "ssd300_vgg16"])
def test_weights_of_another_member_are_refused_whatever_the_classes(coco_weights, name):
    with pytest.raises(ValueError, match=r"coco.pth: not the weights of this model"):
        make(name, weights=str(coco_weights), num_classes=3)


CLASS_BIAS, BOX_BIAS = (f"head.{kind}_head.module_list.0.bias" for kind in ("classification", "regression"))


@pytest.mark.parametrize("num_classes", [None, 91, 3])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.classification_head.module_list.3.bias", torch.zeros(5)),
        ("head.classification_head.module_list.3.weight", torch.zeros(6 * 91, 7, 3, 3)),
        (CLASS_BIAS, torch.zeros(0)),
        (CLASS_BIAS, "text"),
        (BOX_BIAS, torch.zeros(0)),
        (BOX_BIAS, torch.tensor(1.0)),
        (7, torch.zeros(1)),
    ],
)
def test_damaged_weights_are_refused_whatever_the_classes(coco_weights, tmp_path, num_classes, name, value):
    """Nothing that is damaged begins anew."""
    path = tmp_path / "damaged.pth"
    torch.save(torch.load(coco_weights, weights_only=True) | {name: value}, path)
    with pytest.raises(ValueError, match=r"damaged.pth: (damaged|not the weights of|expected a state dict)") as error:
        ssd.get_model("ssd300_resnet18", weights=str(path), num_classes=num_classes)
    assert len(str(error.value).replace(str(tmp_path), "")) < 350


@pytest.mark.parametrize(
    ("content", "scaling"),
    [({"args": {"input_scaling": "caffe"}}, "imagenet"), ({"args": {"input_scaling": "imagenet"}}, "caffe")],
)
def test_an_input_scaling_that_contradicts_the_checkpoint(tmp_path, content, scaling):
    content |= {"model": make("ssd300_resnet18").state_dict(), "version": ssd.VERSION}
    ssd.save_file(content, tmp_path / "model.pth")
    told = content["args"]["input_scaling"]
    with pytest.raises(ValueError, match=rf"input scaling {told}, not {scaling}; use --input-scaling {told}"):
        make("ssd300_resnet18", weights=str(tmp_path / "model.pth"), input_scaling=scaling)
    assert make("ssd300_resnet18", weights=str(tmp_path / "model.pth"), input_scaling=told).input_scaling == told


def test_an_input_scaling_that_contradicts_torchvisions_weights(monkeypatch):
    """As recipes before the fourth step of the study would have it."""
    state_dict = make("ssd300_vgg16", num_classes=91).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state_dict)
    settings = {"weights": "SSD300_VGG16_Weights.COCO_V1", "num_classes": 3}
    with pytest.raises(ValueError, match="use --input-scaling caffe"):
        ssd.get_model("ssd300_vgg16", input_scaling="imagenet", **settings)
    assert ssd.get_model("ssd300_vgg16", **settings).input_scaling == "caffe"


def test_a_size_without_layers():
    with pytest.raises(ValueError, match="300 and 512 pixels, not of 400"):
        build(ssd.backbones.BACKBONES["resnet18"], 400, weights_backbone=None)


def test_a_checkpoint_with_an_unknown_input_scaling(tmp_path):
    content = {"model": make("ssd300_resnet18").state_dict(), "args": {"input_scaling": ["caffe"]}}
    ssd.save_file(content | {"version": ssd.VERSION}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: damaged: it was trained with unknown input scaling, \['caffe'\]"):
        ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))


@pytest.mark.parametrize("scaling", ["caffe", "imagenet"])
def test_a_checkpoint_tells_its_input_scaling(tmp_path, scaling):
    content = {"model": make("ssd300_resnet18").state_dict(), "args": {"input_scaling": scaling}}
    ssd.save_file(content, tmp_path / "model.pth")
    model = ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))
    assert model.input_scaling == scaling
    assert model.image_mean.flatten().tolist() == pytest.approx([255 * x for x in ssd.INPUT_SCALINGS[scaling][0]])


def smallest_side(model: ssd.SSD) -> float:
    """Of the first default box, as a share of the image."""
    return ((model.default_boxes[0, 2] - model.default_boxes[0, 0]) / model.size).item()


SMALLEST = {300: {"coco": 0.07, "voc": 0.1}, 512: {"coco": 0.04, "voc": 0.07}}


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssd300_vgg11_bn", "ssd512_vgg13"])
def test_default_boxes_by_name(name):
    for asked, expected in (("default", "coco"), ("coco", "coco"), ("voc", "voc")):
        model = make(name, default_boxes=asked)
        assert model.default_boxes_name == expected
        assert smallest_side(model) == pytest.approx(SMALLEST[model.size][expected])
        assert model.notes == []


@pytest.mark.parametrize("name", ["ssd300_resnet18", "ssd512_resnet50", "ssdlite320_mobilenet_v3_large"])
@pytest.mark.parametrize("asked", ["voc", "coco"])
def test_default_boxes_of_caffe_are_for_a_vgg(name, asked):
    assert make(name).default_boxes_name == "default"
    with pytest.raises(ValueError, match=rf"^the default boxes '{asked}' are for a VGG; use --default-boxes default$"):
        make(name, default_boxes=asked)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a model of SSD300 with VGG11 with what a checkpoint tells of its flags, by the name of a file."""
    state_dict = make("ssd300_vgg11", num_classes=91).state_dict()
    folder = tmp_path_factory.mktemp("saved")

    def save(args: dict | None, name: str = "model.pth") -> str:
        path = folder / name
        ssd.save_file(state_dict if args is None else {"model": state_dict, "args": args}, path)
        return str(path)

    return save


@pytest.mark.parametrize("num_classes", [None, 91, 21])
@pytest.mark.parametrize("boxes", ["coco", "voc"])
def test_a_checkpoint_tells_its_default_boxes(saved, boxes, num_classes):
    weights = saved({"default_boxes": boxes, "input_scaling": "caffe"})
    for asked in ("default", boxes):
        model = make("ssd300_vgg11", weights=weights, default_boxes=asked, num_classes=num_classes)
        assert model.default_boxes_name == boxes
        assert smallest_side(model) == pytest.approx(SMALLEST[300][boxes])
        assert model.notes == []
    other = "voc" if boxes == "coco" else "coco"
    fault = rf"model.pth: was trained with default boxes {boxes}, not {other}; use --default-boxes {boxes}$"
    with pytest.raises(ValueError, match=fault):
        make("ssd300_vgg11", weights=weights, default_boxes=other)


@pytest.mark.parametrize("value", ["pascal", ["voc"], {}, 0, 0.1, "", False])
@pytest.mark.parametrize("flag", ["default_boxes", "input_scaling"])
def test_a_checkpoint_that_tells_nonsense(saved, flag, value):
    weights = saved({"input_scaling": "caffe", "default_boxes": "coco"} | {flag: value})
    with pytest.raises(
        ValueError, match=rf"model.pth: damaged: it was trained with unknown {flag.replace('_', ' ')}, "
    ):
        make("ssd300_vgg11", weights=weights)


def test_what_a_state_dict_does_not_tell_is_noted_where_it_is_assumed(saved):
    weights = saved(None)
    model = make("ssd300_vgg11", weights=weights)
    assert (model.input_scaling, model.default_boxes_name) == ("imagenet", "coco")
    assert model.notes == [
        f"{weights}: does not tell its input scaling; imagenet is assumed (--input-scaling)",
        f"{weights}: does not tell its default boxes; coco is assumed (--default-boxes)",
    ]
    asked = {"input_scaling": "caffe", "default_boxes": "voc"}
    model = make("ssd300_vgg11", weights=weights, **asked)
    assert (model.input_scaling, model.default_boxes_name, model.notes) == ("caffe", "voc", [])
    (note,) = make("ssd300_vgg11", weights=saved({"input_scaling": "caffe"})).notes
    assert "default boxes" in note


def test_where_there_is_no_choice_nothing_is_assumed(coco_weights):
    (note,) = make("ssd300_resnet18", weights=str(coco_weights), num_classes=None).notes
    assert "input scaling" in note
    assert make("ssd300_resnet18").notes == []


def test_a_whole_model_of_torchvision_tells_by_the_name_of_its_file(tmp_path):
    for name, file, expected in (
        ("ssd300_vgg16", "ssd300_vgg16_coco-b556d3b4.pth", ("caffe", "coco")),
        ("ssdlite320_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large_coco-a79551df.pth", ("tensorflow", "default")),
    ):
        torch.save(make(name).state_dict(), tmp_path / file)
        model = make(name, weights=str(tmp_path / file))
        assert (model.input_scaling, model.default_boxes_name, model.notes) == (*expected, [])
        with pytest.raises(
            ValueError, match=rf"{file}: was trained with input scaling {expected[0]}, not imagenet; use"
        ):
            make(name, weights=str(tmp_path / file), input_scaling="imagenet")
    with pytest.raises(ValueError, match="was trained with default boxes coco, not voc; use --default-boxes coco"):
        make("ssd300_vgg16", weights=str(tmp_path / "ssd300_vgg16_coco-b556d3b4.pth"), default_boxes="voc")


def test_a_checkpoint_knows_better_than_the_name_of_its_file(saved):
    weights = saved({"input_scaling": "imagenet", "default_boxes": "voc"}, "ssd300_vgg16_coco-b556d3b4.pth")
    model = make("ssd300_vgg11", weights=weights)
    assert (model.input_scaling, model.default_boxes_name, model.notes) == ("imagenet", "voc", [])


def test_a_checkpoint_of_a_vgg_is_none_of_a_resnet_whatever_its_boxes(saved):
    with pytest.raises(ValueError, match="not the weights of this model"):
        make("ssd300_resnet18", weights=saved({"default_boxes": "voc", "input_scaling": "caffe"}))
