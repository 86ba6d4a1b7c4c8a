"""Checkpoints in a folder: saved at any moment, damaged, kept, chosen."""

import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import ssd
from engine import checkpoints
from tests.conftest import ROOT


def checkpoint_at(step: int, weight: float = 0.0) -> dict:
    """As much as makes a checkpoint of train.py."""
    return {
        "model": {"weight": torch.full((50_000,), weight)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.full((50_000,), weight)}}},
        "lr_scheduler": {"last_epoch": step},
        "scaler": {},
        "rng": torch.get_rng_state(),
        "args": {},
        "categories": [],
        "num_images": 7,
        "evaluated_step": 0,
        "best_ap": -1.0,
        "overflows": 0,
    }


class StateAt:
    """A training state that is at a step."""

    evaluated_step = 0

    def __init__(self, step: int):
        self.global_step = step

    def state_dict(self) -> dict:
        return checkpoint_at(self.global_step)


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SAVE_LOOP = """
import os, sys
from pathlib import Path
import torch
from engine import checkpoints
from tests.engine.test_checkpoints import StateAt

folder = Path(sys.argv[1])
torch.set_num_threads(1)
for line in sys.stdin:  # a child per line, so that PyTorch is imported once
    pid = os.fork()
    if pid == 0:
        step = int(line)
        saver = checkpoints.Checkpoints(folder, keep=1, origin={}, latest_step=step or None)
        while True:
            step += 1
            saver.save(StateAt(step))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""


def test_a_run_that_is_killed_while_it_saves_leaves_a_sound_checkpoint(tmp_path):
    """Twenty times, at any moment of a loop that does nothing else; each goes on from what the one before left."""
    script, folder = tmp_path / "script.py", tmp_path / "out"
    folder.mkdir()
    script.write_text(SAVE_LOOP)
    command = [sys.executable, str(script), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rng = np.random.default_rng()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as loop:
        steps, cut = [0], 0
        for _ in range(20):
            print(steps[-1], file=loop.stdin, flush=True)
            pid = int(loop.stdout.readline())
            before = (folder / "checkpoint.pth").stat() if steps[-1] else None
            deadline = time.monotonic() + 60
            while not (folder / "checkpoint.pth").exists() or (folder / "checkpoint.pth").stat() == before:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            assert loop.stdout.readline() == "killed\n"
            found = checkpoints.newest_sound(folder)
            assert found.path == folder / "checkpoint.pth"
            cut += (folder / "checkpoint.pth.tmp").exists()
            steps.append(checkpoints.step_of(found.content))
        loop.stdin.close()
    assert steps == sorted(steps)
    assert cut > 0, "no kill came within a save"


def test_older_checkpoints_stay_and_the_oldest_go(tmp_path):
    saver = checkpoints.Checkpoints(tmp_path, keep=2, origin={"git": "abc"}, latest_step=None)
    for step in (5, 10, 15, 100):
        saver.save(StateAt(step))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth", "checkpoint_10.pth", "checkpoint_15.pth"}
    assert [checkpoints.step_of(ssd.load_file(tmp_path / f"checkpoint_{step}.pth")) for step in (10, 15)] == [10, 15]
    assert checkpoints.read_checkpoint(tmp_path / "checkpoint.pth")["git"] == "abc"
    other = checkpoints.Checkpoints(tmp_path, keep=0, origin={}, latest_step=100)
    other.save(StateAt(101))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_file_system_without_links_keeps_older_checkpoints_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    saver = checkpoints.Checkpoints(tmp_path, keep=1, origin={}, latest_step=None)
    for step in (1, 2, 3):
        saver.save(StateAt(step))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth", "checkpoint_2.pth"}


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path) -> None:
    path.write_bytes(b"")


def spoil(path) -> None:
    """Not damaged, but of no use: as a run without our checks would have saved it."""
    ssd.save_file(checkpoint_at(30, weight=torch.nan) | {"version": ssd.VERSION}, path)


@pytest.mark.parametrize("damage", [flip_a_byte, cut, empty, spoil])
def test_auto_falls_back_to_the_newest_sound_checkpoint(tmp_path, capsys, damage):
    saver = checkpoints.Checkpoints(tmp_path, keep=2, origin={}, latest_step=None)
    for step in (10, 20, 30):
        saver.save(StateAt(step))
    saver.save_best(checkpoint_at(15))
    latest = tmp_path / "checkpoint.pth"
    damage(latest)
    found = checkpoints.newest_sound(tmp_path)
    path = found.path
    assert (path.name, checkpoints.step_of(found.content)) == ("checkpoint_20.pth", 20)
    assert found.unusable == (latest,)
    console = capsys.readouterr().out
    assert console.startswith(f"{latest}: ")
    assert console.endswith(f"; continuing from {path} instead\n")
    with pytest.raises(ValueError, match=r"checkpoint.pth: "):
        checkpoints.read_checkpoint(latest)
    damage(path)
    assert checkpoints.newest_sound(tmp_path).path.name == "best.pth"
    for name in ("best.pth", "checkpoint_10.pth"):
        damage(tmp_path / name)
    with pytest.raises(ValueError, match=r"no other checkpoint in .* is sound"):
        checkpoints.newest_sound(tmp_path)


def test_auto_begins_anew_only_where_there_is_nothing(tmp_path, capsys):
    assert checkpoints.newest_sound(tmp_path) is checkpoints.newest_sound(tmp_path / "nowhere") is None
    saver = checkpoints.Checkpoints(tmp_path, keep=1, origin={}, latest_step=None)
    for step in (1, 2):
        saver.save(StateAt(step))
    (tmp_path / "checkpoint.pth").unlink()
    assert checkpoints.newest_sound(tmp_path).path.name == "checkpoint_1.pth"
    assert "checkpoint.pth: no such checkpoint file; continuing from" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["model", "model_ema", "optimizer"])
def test_what_is_not_finite_is_not_saved_over_what_is(tmp_path, part):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint(checkpoint_at(1), path)
    bad = checkpoint_at(2) | {"model_ema": {"module.weight": torch.zeros(50_000)}}
    parts = {
        "model": bad["model"]["weight"],
        "model_ema": bad["model_ema"]["module.weight"],
        "optimizer": bad["optimizer"]["state"][0]["momentum_buffer"],
    }
    parts[part][7] = torch.inf
    with pytest.raises(FloatingPointError, match="is no longer finite; nothing was saved"):
        checkpoints.save_checkpoint(bad, path)
    assert checkpoints.step_of(checkpoints.read_checkpoint(path)) == 1
    ssd.save_file(bad | {"version": ssd.VERSION}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: .* is no longer finite; the checkpoint is of no use"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler": {}},
        {"lr_scheduler": {"last_epoch": "7"}},
        {"model": [torch.zeros(3)]},
        {"args": None},
        {"rng": 5},
        {"model": {"weight": torch.zeros(1).expand(10**13)}},
        {"model_ema": [torch.zeros(3)]},
        {"model_ema": None, "args": {"ema": 0.9}},
        {"model_ema": {"module.weight": torch.zeros(1).expand(10**13)}},
    ],
    ids=lambda changes: str(list(changes)),
)
def test_content_that_no_run_writes_is_refused(tmp_path, changes):
    """As one may make up, with a hash that is right; the last of them would fill the memory of any machine."""
    path = tmp_path / "checkpoint.pth"
    ssd.save_file(checkpoint_at(1) | changes | {"version": ssd.VERSION}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: (damaged, or made by another|refused, because a tensor)"):
        checkpoints.newest_sound(tmp_path)


def test_an_average_that_a_checkpoint_lacks_is_named(tmp_path):
    """It would else begin anew when the run is continued."""
    path = tmp_path / "checkpoint.pth"
    average = {"model_ema": {"n_averaged": torch.tensor(1), "module.weight": torch.zeros(50_000)}}
    trained_with = checkpoint_at(1) | {"args": {"ema": 0.9}, "version": ssd.VERSION}
    ssd.save_file(trained_with | average, path)
    assert checkpoints.read_checkpoint(path).keys() >= average.keys()
    ssd.save_file(trained_with, path)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth: damaged, or made by another program: its model_ema is missing"
    ):
        checkpoints.read_checkpoint(path)


def test_compressed_files_are_refused(tmp_path):
    """A few kilobytes of them may hold gigabytes."""
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in whole.namelist():
            bomb.writestr(part, whole.read(part))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    ssd.load_file(path)
    with pytest.raises(ValueError, match=r"bomb\.pth: damaged or no checkpoint \(it is compressed\)"):
        ssd.load_file(tmp_path / "bomb.pth")
