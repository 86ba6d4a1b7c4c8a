import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_path(tmp_path_factory) -> Path:
    """A tiny data set in COCO's layout: 12 images to train on, 7 to validate on."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    shapes.draw_data_set(path, num_images={"train2017": 12, "val2017": 7})
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run():
    """Runs a script as a user does, and returns the finished process; ``processes`` starts it under torchrun."""

    def run_script(*command, processes: int = 1, fails: bool = False) -> subprocess.CompletedProcess:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if processes > 1 else dict(os.environ)
        result = subprocess.run(
            [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
        )
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result

    return run_script
