"""What a VGG begins with: weights by the names of torchvision and of Caffe's world, fc6 and fc7 included."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg

import ssd

CLASSIFIER = {"0.weight": (4096, 512 * 7 * 7), "0.bias": (4096,), "3.weight": (4096, 4096), "3.bias": (4096,)}
CONVS_OF_VGG16 = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def features_of(name: str) -> dict[str, Tensor]:
    """Random convolutions of a VGG, by torchvision's names."""
    cfg = vgg.cfgs[ssd.backbones.VGG_LAYERS[name.removesuffix("_bn")]]
    layers = vgg.make_layers(cfg, batch_norm=name.endswith("_bn"))
    return {f"features.{key}": value for key, value in layers.state_dict().items()}


def reduced_fc() -> dict[str, Tensor]:
    """As of vgg16_reducedfc.pth."""
    convs = {name.removeprefix("features."): value for name, value in features_of("vgg16").items()}
    fc = {"31.weight": torch.rand(1024, 512, 3, 3), "31.bias": torch.rand(1024)}
    return convs | fc | {"33.weight": torch.rand(1024, 1024, 1, 1), "33.bias": torch.rand(1024)}


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """Of ImageNet's 1000 classes."""
    generator = torch.Generator().manual_seed(5)
    shapes = CLASSIFIER | {"6.weight": (1000, 4096), "6.bias": (1000,)}
    return {f"classifier.{name}": torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def begin(tmp_path):
    """A model that begins with a state dict, from a file called weights.pth."""

    def get_model(name: str, state_dict: dict, **settings) -> ssd.SSD:
        torch.save(state_dict, tmp_path / "weights.pth")
        return ssd.get_model(name, weights_backbone=str(tmp_path / "weights.pth"), num_classes=2, **settings)

    return get_model


def fc_of(model: ssd.SSD) -> tuple[nn.Conv2d, nn.Conv2d]:
    _, fc6, _, fc7, _ = model.backbone.extra[0][-1]
    return fc6, fc7


def convs_of(model: ssd.SSD) -> list[nn.Conv2d]:
    """Those that VGG has, in its order."""
    layers = [*model.backbone.features, *model.backbone.extra[0][:-1]]
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssd512_vgg16"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_vgg16_reducedfc_gives_its_convolutions_and_fc6_and_fc7(begin, name, prefix):
    """By its keys alone, whatever the file is called; it is Caffe's, and nothing is assumed."""
    state_dict = reduced_fc()
    model = begin(name, {prefix + key: value for key, value in state_dict.items()})
    for index, conv in zip(CONVS_OF_VGG16, convs_of(model), strict=True):
        assert torch.equal(conv.weight, state_dict[f"{index}.weight"])
        assert torch.equal(conv.bias, state_dict[f"{index}.bias"])
    for index, conv in zip((31, 33), fc_of(model), strict=True):
        assert torch.equal(conv.weight, state_dict[f"{index}.weight"])
        assert torch.equal(conv.bias, state_dict[f"{index}.bias"])
    assert model.input_scaling == "caffe"
    assert model.notes == []
    assert begin(name, state_dict, input_scaling="imagenet", subsample_fc=True).notes == []


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "vgg16_bn", "vgg19"])
def test_vgg16_reducedfc_is_no_other_vgg(begin, name):
    with pytest.raises(ValueError, match=rf"weights.pth: is a VGG16 \(.*\), not a {name.upper()}$"):
        begin(f"ssd300_{name}", reduced_fc())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"31.weight": torch.zeros(4096, 512, 7, 7)}, "size mismatch for fc6.weight"),
        ({"33.bias": torch.full((1024,), torch.nan)}, "the weight fc7.bias is not finite"),
        ({"35.weight": torch.zeros(1)}, "Missing key.*features.0.weight.*the file has 31 keys: 0.weight, 0.bias, 2.w"),
    ],
    ids=["shape", "nan", "another key"],
)
def test_a_vgg16_reducedfc_that_is_damaged(begin, changes, fault):
    with pytest.raises(ValueError, match=rf"weights.pth: .*{fault}") as error:
        begin("ssd300_vgg16", reduced_fc() | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssd512_vgg11_bn"])
def test_fc6_and_fc7_are_subsampled_where_asked_for(begin, name, classifier):
    """Number by number, at the places of Caffe's net surgery: each output one of four, each cell one of three."""
    state_dict = features_of(name[7:]) | classifier
    fc6, fc7 = fc_of(begin(name, state_dict, subsample_fc=True))
    first, second = (classifier[f"classifier.{i}.weight"] for i in (0, 3))
    for output, channel, row, column in ((0, 0, 0, 0), (1, 0, 0, 1), (3, 7, 2, 1), (1023, 511, 2, 2)):
        cell = channel * 49 + 3 * row * 7 + 3 * column
        assert fc6.weight[output, channel, row, column] == first[4 * output, cell]
        assert fc7.weight[output, channel, 0, 0] == second[4 * output, 4 * channel]
    assert fc6.bias[5] == classifier["classifier.0.bias"][20]
    assert fc7.bias[1023] == classifier["classifier.3.bias"][4092]
    assert (fc6.dilation, fc6.kernel_size, fc7.kernel_size) == ((6, 6), (3, 3), (1, 1))


def test_they_begin_anew_where_not_asked_for(begin, classifier):
    model = begin("ssd300_vgg11", features_of("vgg11") | classifier)
    assert all(conv.bias.abs().max() == 0 for conv in fc_of(model))
    assert [note for note in model.notes if "fc6" in note] == []


@pytest.mark.parametrize(
    "unusable",
    [
        lambda classifier: {},
        lambda classifier: {name: torch.full_like(value, torch.nan) for name, value in classifier.items()},
        lambda classifier: classifier | {"classifier.3.bias": torch.full((4096,), torch.inf)},
        lambda classifier: classifier | {"classifier.0.weight": torch.zeros(512, 512 * 7 * 7)},
        lambda classifier: {name: value for name, value in classifier.items() if name != "classifier.0.bias"},
    ],
    ids=["none", "nan", "infinite", "narrow", "incomplete"],
)
def test_a_classifier_that_cannot_be_used_is_noted(begin, classifier, unusable):
    model = begin("ssd300_vgg11", features_of("vgg11") | unusable(classifier), subsample_fc=True, input_scaling="caffe")
    (note,) = model.notes
    assert note.endswith("weights.pth: has no classifier to subsample; fc6 and fc7 begin anew")
    assert all(conv.bias.abs().max() == 0 and conv.weight.isfinite().all() for conv in fc_of(model))


def test_what_is_not_kept_of_a_classifier_may_be_nan(begin, classifier):
    bias = classifier["classifier.0.bias"].clone()
    bias[1::4] = torch.nan
    model = begin("ssd300_vgg11", features_of("vgg11") | classifier | {"classifier.0.bias": bias}, subsample_fc=True)
    assert torch.equal(fc_of(model)[0].bias, bias[::4])


@pytest.mark.parametrize("name", ["ssd300_resnet18", "ssdlite320_mobilenet_v3_large"])
def test_other_backbones_have_no_fc(name):
    assert ssd.get_model(name, weights_backbone=None, subsample_fc=True).notes == []


def test_random_weights_have_nothing_to_subsample():
    assert ssd.get_model("ssd300_vgg11", weights_backbone="none", subsample_fc=True).notes == []
