"""Files of others, in the hands of the scripts: none of them runs code, or names what is not its own."""

import json
import os

import pytest
import torch

import coco
import evaluate
import train
from coco import DataError
from tests.conftest import SMALL, annotation, image


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["zip", "legacy"])
def malicious(request, tmp_path):
    """A checkpoint that makes the folder ``owned``, in both of PyTorch's formats; plain ``torch.load`` falls for it."""
    content = {"model": {}, "optimizer": Malicious(tmp_path / "owned")}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=request.param == "zip")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    (tmp_path / "owned").rmdir()
    return tmp_path / "bad.pth"


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("flag", ["--resume", "--weights", "--weights-backbone", "--checkpoint"])
def test_code_in_a_checkpoint_is_refused_by_the_scripts(data_path, tmp_path, monkeypatch, malicious, flag, forced):
    if forced:  # by which PyTorch lets a user overrule those who did not say weights_only
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    arguments = ["--data-path", data_path, "--output-dir", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    script = evaluate if flag == "--checkpoint" else train
    arguments = [str(argument) for argument in [*arguments, flag, malicious]]
    if script is train:
        args = train.parse_args([*SMALL[:2], *arguments])
    else:
        args = evaluate.get_args_parser().parse_args([*arguments, "--model", "ssd300_resnet18"])
    with pytest.raises(ValueError, match=r"bad\.pth: refused, because it holds more than tensors and plain data"):
        script.main(args)
    assert not (tmp_path / "owned").exists()


def test_resume_auto_neither_runs_code_nor_begins_anew(data_path, tmp_path, malicious):
    (tmp_path / "out").mkdir()
    malicious.rename(tmp_path / "out/checkpoint.pth")
    arguments = [*SMALL, "--data-path", data_path, "--output-dir", tmp_path / "out", "--resume", "auto"]
    with pytest.raises(ValueError, match=r"checkpoint\.pth: refused.* no other checkpoint in .* is sound"):
        train.main(train.parse_args([str(argument) for argument in arguments]))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", "..", "a/../.."])
def test_annotations_do_not_reach_out_of_the_image_folder(tmp_path, write, name):
    path = write([annotation(1)], images=[image(1) | {"file_name": name}])
    with pytest.raises(DataError, match=r"image 1 has file_name .* it must be a path inside the image folder"):
        coco.read_annotations(path, images_dir=tmp_path)


def test_an_index_of_annotations_is_no_way_around(tmp_path, write):
    """What is stored beside the run is never unpickled, also if its checksums are right; the json is read instead."""
    path = write([annotation(1)], images=[image(1)])
    coco.read_annotations(path, tmp_path / "index")
    (folder,) = (tmp_path / "index").iterdir()
    (folder / "file_names.npy").write_bytes(b"\x80\x04.")
    about = json.loads((folder / "about.json").read_text())
    about["checksums"] = coco.index.checksums(folder)  # of one who can write there
    (folder / "about.json").write_text(json.dumps(about))
    assert coco.read_annotations(path, tmp_path / "index").file_name(0) == "1.png"
