import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50, vgg

from ssd import SSDFeatureExtractorLight, SSDFeatureExtractorResNet, SSDFeatureExtractorVGG
from ssd.model import grid_sizes

GRIDS = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]


def make_vgg(**settings) -> SSDFeatureExtractorVGG:
    return SSDFeatureExtractorVGG(vgg.make_layers(vgg.cfgs["D"]), **settings)


@pytest.mark.parametrize(
    ("make", "grids"),
    [
        (make_vgg, GRIDS),
        (lambda: SSDFeatureExtractorResNet(resnet18()), GRIDS),
        (lambda: SSDFeatureExtractorResNet(resnet50()), GRIDS),
        (SSDFeatureExtractorLight, [*GRIDS[:-1], (2, 2)]),
    ],
)
def test_contract(make, grids):
    backbone = make().eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 300, 300))
    assert [tuple(feature_map.shape[-2:]) for feature_map in maps] == grids
    assert [feature_map.shape[1] for feature_map in maps] == backbone.out_channels


def test_all_maps_have_the_precision_of_the_convolutions():
    """Else both heads would round the first one, which is computed in float32, for themselves."""
    backbone = make_vgg().eval()
    for enabled, expected in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert {one.dtype for one in backbone(torch.rand(1, 3, 300, 300))} == {expected}


def test_the_first_map_of_vgg_is_normalised_and_scaled():
    backbone = make_vgg()
    with torch.no_grad():
        norms = backbone(torch.rand(1, 3, 300, 300))[0].norm(dim=1)
    # both here and there 512 squares are summed, each of which may round by 6e-8: in all by 3e-5 at most
    torch.testing.assert_close(norms, torch.full_like(norms, 20.0), rtol=1e-4, atol=0)


def test_new_layers_are_xavier_with_zero_bias():
    fc6 = make_vgg().extra[0][-1][1]
    bound = (6 / (9 * (fc6.in_channels + fc6.out_channels))) ** 0.5
    assert bound * 0.99 < fc6.weight.abs().max() <= bound
    assert fc6.bias.abs().max() == 0


@pytest.mark.parametrize(("trainable", "first"), [(5, 0), (4, 5), (3, 10), (2, 17), (1, 24)])
def test_freezing_of_vgg_by_stage(trainable, first):
    """``first`` is the index of the first trainable layer of VGG16."""
    features = vgg.make_layers(vgg.cfgs["D"])
    backbone = SSDFeatureExtractorVGG(features, trainable_layers=trainable)
    convs = {i: layer for i, layer in enumerate(features) if isinstance(layer, nn.Conv2d)}
    assert {i for i, conv in convs.items() if conv.weight.requires_grad} == {i for i in convs if i >= first}
    assert all(p.requires_grad for block in backbone.extra[1:] for p in block.parameters())


def test_freezing_all_of_vgg_leaves_the_new_layers():
    backbone = make_vgg(trainable_layers=0)
    assert not any(p.requires_grad for p in backbone.features.parameters())
    assert backbone.extra[0][-1][1].weight.requires_grad


@pytest.mark.parametrize(("trainable", "expected"), [(5, 5), (4, 4), (1, 1), (0, 0)])
def test_freezing_of_resnet(trainable, expected):
    resnet = resnet18()
    SSDFeatureExtractorResNet(resnet, trainable_layers=trainable)
    parts = [resnet.conv1, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    assert [next(part.parameters()).requires_grad for part in parts] == [False] * (5 - expected) + [True] * expected


@pytest.mark.parametrize("make", [lambda: SSDFeatureExtractorResNet(resnet18()), SSDFeatureExtractorLight])
def test_backbones_with_batch_norm_train_on_a_single_image(make):
    assert len(make().train()(torch.rand(1, 3, 300, 300))) == 6


@pytest.mark.parametrize("trainable", [7, 6, 1, 0])
def test_freezing_of_the_light_one(trainable):
    stages = SSDFeatureExtractorLight(trainable_layers=trainable).features
    trains = [[parameter.requires_grad for parameter in stage.parameters()] for stage in stages]
    assert [all(stage) for stage in trains] == [any(stage) for stage in trains]
    assert [all(stage) for stage in trains] == [False] * (7 - trainable) + [True] * trainable


@pytest.mark.parametrize("trainable", [-1, 6])
def test_impossible_number_of_trainable_layers(trainable):
    with pytest.raises(ValueError, match=f"0 to 5, got {trainable}"):
        make_vgg(trainable_layers=trainable)


def test_grid_sizes_leaves_the_backbone_as_it_was():
    backbone = SSDFeatureExtractorResNet(resnet18())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert backbone.training
    assert grid_sizes(backbone, 300) == GRIDS
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
