"""Two machines: two torchrun agents that meet at an address, in their own network namespaces where that is allowed."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_resume import assert_equal_states
from tests.tiny import TINY

NAMES = [f"ssd-{os.getpid()}-{node}" for node in (0, 1)]
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def make_namespaces() -> bool:
    """Two network namespaces, joined by a cable; False where this user may not."""
    commands = [f"ip netns add {name}" for name in NAMES]
    commands.append(f"ip link add eth0 netns {NAMES[0]} type veth peer name eth0 netns {NAMES[1]}")
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        commands += [f"ip -n {name} addr add {address}/24 dev eth0"]
        commands += [f"ip -n {name} link set {device} up" for device in ("eth0", "lo")]
    return all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands)


@pytest.fixture(scope="module")
def machines():
    """Each machine's prefix of commands, their environment, the machines' addresses, and a port of the first."""
    in_namespaces = shutil.which("ip") is not None and make_namespaces()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if in_namespaces:
        prefixes = [["ip", "netns", "exec", name] for name in NAMES]
        yield prefixes, {"GLOO_SOCKET_IFNAME": "eth0"}, ADDRESSES, port
    else:
        loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
        yield [[], []], {"GLOO_SOCKET_IFNAME": loopback}, ["127.0.0.1"] * 2, port
    for name in NAMES:
        if shutil.which("ip") is not None:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def validation_lines(output_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "/s" not in k} for line in lines if line["kind"] == "val"]


def test_two_machines_train_and_evaluate_as_one_does(run, data_path, tmp_path, machines):
    command = ["-m", "tests.tiny", *TINY, "--data-path", data_path, "--epochs", 2, "--max-steps", 3, "--workers", 0]
    run(*command, "--output-dir", tmp_path / "one", processes=2)
    prefixes, environment, addresses, port = machines
    agents = []
    for node, prefix in enumerate(prefixes):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={addresses[0]}:{port}", "--rdzv-id=7"]
        torchrun += [f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr={addresses[node]}"]
        flags = itertools.chain(command, ["--output-dir", tmp_path / "two"])
        agents.append(
            subprocess.Popen(
                [*prefix, *torchrun, *map(str, flags)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
        )
    try:
        consoles = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], consoles
    assert sum("Done: 3 steps" in console for console in consoles) == 1
    assert_equal_states(tmp_path / "two/checkpoint.pth", tmp_path / "one/checkpoint.pth")
    assert validation_lines(tmp_path / "two") == validation_lines(tmp_path / "one") != []
