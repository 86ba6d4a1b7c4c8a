import argparse
import os
import urllib.error

import pytest
import torch
from torchvision.models import vgg

import ssd


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


def test_weights_of_another_model(tmp_path):
    torch.save(ssd.get_model("ssd300_resnet18", weights_backbone=None).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: not the weights of this model: Missing key"):
        ssd.get_model("ssd300_vgg16", weights=str(tmp_path / "model.pth"))


def test_weights_of_no_detector(vgg_file):
    with pytest.raises(ValueError, match=r"vgg.pth: not the weights of an SSD model"):
        ssd.get_model("ssd300_vgg16", weights=str(vgg_file))


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
        ssd.load_state_dict("SSD300_VGG16_Weights.COCO_V9")


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
