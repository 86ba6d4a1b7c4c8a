import argparse
import os
import re
import urllib.error

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torchvision.models import WeightsEnum, get_model, resnet18, vgg

import ssd
from tests.ssd.test_vgg_weights import features_of


@pytest.fixture
def vgg_file(tmp_path):
    """Features of VGG16 in half precision, with a broken classifier, as such files have."""
    state_dict = {
        f"features.{name}": value.half() for name, value in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()
    }
    path = tmp_path / "vgg.pth"
    torch.save(state_dict | {"classifier.0.weight": torch.full((2, 2), torch.nan)}, path)
    return path


def test_backbone_from_a_file(vgg_file):
    model = ssd.get_model("ssd300_vgg16", weights_backbone=str(vgg_file), num_classes=3)
    state_dict = torch.load(vgg_file, weights_only=True)
    assert torch.equal(model.backbone.features[0].weight, state_dict["features.0.weight"].float())
    assert torch.equal(model.backbone.extra[0][5].bias, state_dict["features.28.bias"].float())
    assert sum(not p.requires_grad for p in model.parameters()) == 4  # conv1_1 and conv1_2


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=1)}])
def test_whole_model_from_a_state_dict_and_from_torchvisions_checkpoint(tmp_path, wrap):
    source = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5)
    torch.save(wrap(source.state_dict()), tmp_path / "model.pth")
    model = ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))
    assert model.num_classes == 5
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


WRAPS = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.mark.parametrize("prefix", WRAPS)
@pytest.mark.parametrize("nest", [lambda state_dict: state_dict, lambda state_dict: {"model": state_dict, "epoch": 3}])
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix, nest):
    """Of a whole model and of a backbone, in a state dict and in a checkpoint."""
    source = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5)
    path = tmp_path / "model.pth"
    torch.save(nest({prefix + name: value for name, value in source.state_dict().items()}), path)
    model = ssd.get_model("ssd300_resnet18", weights=str(path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())
    source = resnet18()
    torch.save(nest({prefix + name: value for name, value in source.state_dict().items()}), path)
    model = ssd.get_model("ssd300_resnet18", weights_backbone=str(path))
    assert torch.equal(model.backbone.features[0][0].weight, source.conv1.weight)
    assert torch.equal(model.backbone.extra[1][1].bn2.weight, source.layer4[1].bn2.weight)


def test_a_prefix_that_some_names_lack_is_none(tmp_path):
    state_dict = {f"module.{name}": value for name, value in resnet18().state_dict().items()}
    torch.save(state_dict | {"bias": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"the file has 123 keys: module.conv1.weight, module.bn1.weight, "):
        ssd.get_model("ssd300_resnet18", weights_backbone=str(tmp_path / "odd.pth"))


def with_average(model: torch.nn.Module, average: torch.nn.Module) -> dict:
    """A checkpoint as torchvision's classification references write it."""
    return {"model": model.state_dict(), "model_ema": AveragedModel(average).state_dict(), "epoch": 3}


@pytest.mark.parametrize("ema", [True, False])
def test_the_average_of_a_checkpoints_weights_is_taken_unless_told_not_to(tmp_path, ema):
    """Of a whole model and of a backbone."""
    path = str(tmp_path / "model.pth")
    whole = [ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5) for _ in range(2)]
    torch.save(with_average(*whole), path)
    model = ssd.get_model("ssd300_resnet18", weights=path, input_scaling="imagenet", ema=ema)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole[ema].state_dict().items())
    kind = "the moving average of its weights is taken" if ema else "its weights are taken as they are"
    (note,) = model.notes
    assert note.startswith(f"{path}: {kind} (model")
    backbones = resnet18(), resnet18()
    torch.save(with_average(*backbones), path)
    model = ssd.get_model("ssd300_resnet18", weights_backbone=path, input_scaling="imagenet", ema=ema)
    assert torch.equal(model.backbone.features[0][0].weight, backbones[ema].conv1.weight)
    assert model.notes == [note]


@pytest.mark.parametrize("nest", [lambda state_dict: state_dict, lambda state_dict: {"model": state_dict}])
def test_a_file_of_an_average_alone(tmp_path, nest):
    """Whose names begin as those of a wrapped model do, but for that of its counter."""
    source = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5)
    torch.save(nest(AveragedModel(torch.nn.DataParallel(source)).state_dict()), tmp_path / "model.pth")
    model = ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("more", [{}, {"model_ema": None}])
def test_an_average_that_a_file_lacks(tmp_path, more):
    source = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5)
    path = str(tmp_path / "model.pth")
    torch.save({"model": source.state_dict()} | more, path)
    for ema, notes in ((True, []), (False, [f"{path}: has no moving average of its weights (model_ema)"])):
        assert ssd.get_model("ssd300_resnet18", weights=path, input_scaling="imagenet", ema=ema).notes == notes


@pytest.mark.parametrize(
    ("average", "fault"),
    [
        ([torch.zeros(3)], "expected a state dict, found list"),
        ({"n_averaged": torch.tensor(3)}, "not the weights of an SSD model"),
        ({"module.weight": 3.0}, "'module.weight' is no name of a tensor"),
        ({"module.weight": torch.zeros(1).expand(10**13)}, "refused, because a tensor in it is larger"),
    ],
)
def test_an_average_that_is_none(tmp_path, average, fault):
    source = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=5)
    torch.save({"model": source.state_dict(), "model_ema": average}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model\.pth: .*{fault}"):
        ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))


def test_weights_of_another_model(tmp_path):
    torch.save(ssd.get_model("ssd300_resnet18", weights_backbone=None).state_dict(), tmp_path / "model.pth")
    keys = r"the file has \d+ keys: backbone.features.0.0.weight, .*, \.\.\.$"
    with pytest.raises(ValueError, match=rf"model.pth: not the weights of this model: Missing key.*; {keys}"):
        ssd.get_model("ssd300_vgg16", weights=str(tmp_path / "model.pth"))
    with pytest.raises(
        ValueError, match=rf"model.pth: not the weights of this model: Missing.*features\.0\..*; {keys}"
    ):
        ssd.get_model("ssd300_vgg16", weights_backbone=str(tmp_path / "model.pth"))


def test_weights_of_no_detector(vgg_file):
    keys = "the file has 27 keys: features.0.weight, features.0.bias, features.2.weight, ..."
    fault = "not the weights of an SSD model (it has no classification head)"
    with pytest.raises(ValueError, match=re.escape(f"vgg.pth: {fault}; {keys}")):
        ssd.get_model("ssd300_vgg16", weights=str(vgg_file))


@pytest.mark.parametrize("flag", ["weights", "weights_backbone"])
@pytest.mark.parametrize(
    ("nest", "keys"),
    [
        (lambda s: {"state_dict": s}, "it has 1 key: state_dict"),
        (lambda s: {"epoch": 3, "model_state_dict": s}, "it has 2 keys: epoch, model_state_dict"),
        (lambda s: {"model": {"net": s, 7: 1, "lr": 0.1, "x": 2}}, "it has 4 keys: net, 7, lr, ..."),
    ],
)
def test_another_container_than_a_checkpoint_is_named_by_its_keys(tmp_path, flag, nest, keys):
    path = tmp_path / "model.pth"
    torch.save(nest(resnet18().state_dict()), path)
    with pytest.raises(ValueError, match=f"model.pth: expected a state dict, .*; {keys}$"):
        ssd.get_model("ssd300_resnet18", **{flag: str(path)})


@pytest.mark.parametrize("flag", ["weights", "weights_backbone"])
def test_the_keys_that_an_error_names_are_few_and_in_one_line(tmp_path, flag):
    torch.save({f"{i}\n{'x' * 500}": torch.zeros(1) for i in range(9)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="the file has 9 keys: ") as error:
        ssd.get_model("ssd300_resnet18", **{flag: str(tmp_path / "model.pth")})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="the file has 0 keys"):
        ssd.get_model("ssd300_resnet18", **{flag: str(tmp_path / "empty.pth")})


@pytest.mark.parametrize(
    ("model", "name", "published", "scaling"),
    [
        ("ssd300_vgg16", "vgg16-397923af.pth", "VGG16_Weights.IMAGENET1K_V1", "imagenet"),
        ("ssd300_vgg16", "vgg16_features-amdegroot-88682ab5.pth", "VGG16_Weights.IMAGENET1K_FEATURES", "caffe"),
        ("ssd300_vgg19_bn", "vgg19_bn-c79401a0.pth", "VGG19_BN_Weights.IMAGENET1K_V1", "imagenet"),
        ("ssd300_resnet18", "resnet18-f37072fd.pth", "ResNet18_Weights.IMAGENET1K_V1", "imagenet"),
        ("ssd300_resnet50", "resnet50-11ad3fa6.pth", "ResNet50_Weights.IMAGENET1K_V2", "imagenet"),
    ],
)
def test_a_file_of_torchvision_tells_the_input_scaling_as_its_enum_does(
    tmp_path, monkeypatch, model, name, published, scaling
):
    backbone = model.partition("_")[2]
    state_dict = features_of(backbone) if "vgg" in backbone else get_model(backbone, weights=None).state_dict()
    torch.save(state_dict, tmp_path / name)
    torch.save(state_dict, tmp_path / "my.pth")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state_dict)
    by_path, by_name = (
        ssd.get_model(model, weights_backbone=one, num_classes=2) for one in (str(tmp_path / name), published)
    )
    assert by_path.input_scaling == by_name.input_scaling == scaling
    assert by_path.notes == by_name.notes == []
    unknown = ssd.get_model(model, weights_backbone=str(tmp_path / "my.pth"), num_classes=2)
    usual = "caffe" if "vgg16" in model else "imagenet"
    assert unknown.input_scaling == usual
    assert unknown.notes == [
        f"{tmp_path}/my.pth: does not tell its input scaling; {usual} is assumed (--input-scaling)"
    ]
    asked = ssd.get_model(model, weights_backbone=str(tmp_path / "my.pth"), num_classes=2, input_scaling="tensorflow")
    assert (asked.input_scaling, asked.notes) == ("tensorflow", [])


def test_the_map_of_torchvisions_files_has_them_all():
    for source in ("SSD300_VGG16_Weights.COCO_V1", "VGG11_BN_Weights.DEFAULT", "EfficientNet_B0_Weights.IMAGENET1K_V1"):
        enum = ssd.find_published(source)
        assert ssd.find_published(f"/anywhere/{enum.url.rpartition('/')[2]}") is enum
    assert ssd.find_published("vgg16.pth") is None


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: refused"):
        ssd.load_file(tmp_path / "model.pth")
    assert not (tmp_path / "owned").exists()


def test_damaged_files(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"<html>404</html>"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.pth: (damaged|refused)"):
            ssd.load_file(path)


def test_unknown_weights_of_a_backbone():
    with pytest.raises(ValueError, match=r"VGG16_Weights.NONE: torchvision has no weights of this name"):
        ssd.get_model("ssd300_vgg16", weights_backbone="VGG16_Weights.NONE")


def test_a_file_may_be_called_like_an_enum(tmp_path):
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "my_Weights.pth")
    assert ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "my_Weights.pth")).num_classes == 3


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere.pth: no such checkpoint file"):
        ssd.load_file("nowhere.pth")


def test_unknown_enum_name():
    with pytest.raises(ValueError, match=r"SSD300_VGG16_Weights.COCO_V9: torchvision has no weights of this name"):
        ssd.get_model("ssd300_vgg16", weights="SSD300_VGG16_Weights.COCO_V9")


def test_impossible_download_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match="cannot download") as error:
        ssd.get_model("ssd300_vgg16")
    message = str(error.value)
    assert str(tmp_path / "hub/checkpoints/vgg16_features-amdegroot-88682ab5.pth") in message
    assert "'none'" in message
    assert ssd.get_model("ssd300_vgg16", weights="none", weights_backbone="none", num_classes=2).num_classes == 2
    assert "\n" not in message


class Unsavable:
    def __reduce__(self):
        raise OSError("disk full")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    ssd.save_file({"step": 1}, path)
    with pytest.raises(OSError, match="disk full"):
        ssd.save_file({"weight": torch.ones(9), "step": Unsavable()}, path)
    temporary = tmp_path / "model.pth.tmp"
    temporary.symlink_to("/dev/full")  # where the system says that the disk is full
    with pytest.raises(OSError, match="No space left"):
        ssd.save_file({"weight": torch.ones(9_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    ssd.save_file({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def saved_model() -> dict:
    return {"model": {"weight": torch.arange(40.0)}, "version": ssd.VERSION, "args": {"lr": 0.1}}


def test_any_flipped_byte_is_recognised(tmp_path):
    """Wherever it is, in the numbers, the names, the zip archive's tables or the hash itself."""
    path = tmp_path / "model.pth"
    ssd.save_file(saved_model(), path)
    torch.testing.assert_close(ssd.load_file(path)["model"], saved_model()["model"], rtol=0, atol=0)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"model.pth: (damaged|refused)"):
            ssd.load_file(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.pth: (damaged|refused)"):
            ssd.load_file(path)


def test_files_of_other_programs_have_no_hash(tmp_path):
    torch.save(saved_model()["model"], tmp_path / "model.pth")
    assert "weight" in ssd.load_file(tmp_path / "model.pth")


def test_the_hash_does_not_keep_plain_torch_from_loading(tmp_path):
    ssd.save_file(saved_model(), tmp_path / "model.pth")
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
        torch.testing.assert_close(loaded["model"], saved_model()["model"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=3)
    model.head.regression_head.module_list[0].bias.data[0] = value
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: the weight head.regression_head\S+bias is not finite"):
        ssd.get_model("ssd300_resnet18", weights=str(tmp_path / "model.pth"))
