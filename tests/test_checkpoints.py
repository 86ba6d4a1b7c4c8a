import pytest
import torch

import checkpoints


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save_checkpoint({"step": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_checkpoint_goes_to_every_path(tmp_path):
    checkpoints.save_checkpoint({"step": 1}, tmp_path / "a.pth", tmp_path / "b.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    assert torch.load(tmp_path / "b.pth", weights_only=True) == {"step": 1}
