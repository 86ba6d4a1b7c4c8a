"""Runs that are stopped, killed or harmed at a given moment: what they leave, and that they go on as if nothing was."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ssd
import train
from engine import interruption
from engine.checkpoints import read_checkpoint, step_of
from engine.failures import EXIT_CTRL_C, EXIT_INTERRUPTED, EXIT_NOT_FINITE, Interrupted
from engine.interruption import MARKER, TIME_IS_UP, Interruption
from tests.conftest import ROOT, SMALL, children_of, launcher
from tests.sabotage import sabotage
from tests.test_resume import assert_equal_states, load
from tests.tiny import MODEL, TINY

STEPS = 6  # one epoch of four, and half of the next


def arguments(data_path, output_dir, *flags, model=TINY) -> list[str]:
    every = ["--data-path", data_path, "--epochs", 2, "--max-steps", STEPS, "--workers", 0, "--output-dir", output_dir]
    return [str(argument) for argument in [*model, *every, *flags]]


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ssd.family.MODELS, "tiny", MODEL)
        yield


@pytest.fixture(scope="module")
def undisturbed(data_path, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    train.main(train.parse_args(arguments(data_path, output_dir)))
    return output_dir


def scores(output_dir) -> list[tuple]:
    """Step and AP of each evaluation that the log holds."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["AP"], line["AR100"]) for line in lines if line["kind"] == "val"]


@pytest.mark.parametrize(
    ("moment", "call", "number", "saved"),
    [
        ("start", 1, "SIGTERM", 0),
        ("batch", 1, "SIGUSR1", 1),
        ("step", 2, "SIGINT", 2),  # in warm-up
        ("save", 1, "SIGTERM", 4),  # after the first epoch
        ("detect", 2, "SIGUSR1", 4),
        ("score", 1, "SIGTERM", 5),
        ("detect", 4, "SIGHUP", 6),  # the last evaluation
    ],
)
def test_a_signal_stops_a_run_that_goes_on_exactly(
    data_path, tmp_path, undisturbed, monkeypatch, moment, call, number, saved
):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        sabotage(moment, call, number, replace=patch.setattr)
        with pytest.raises(Interrupted, match=f"{number}; everything is saved after [0-9] steps"):
            train.main(train.parse_args(arguments(data_path, tmp_path)))
    assert signal.getsignal(signal.SIGTERM) == before
    assert number in json.loads((tmp_path / MARKER).read_text())["reason"]
    assert step_of(load(tmp_path / "checkpoint.pth")) == saved
    train.main(train.parse_args(arguments(data_path, tmp_path, "--resume", "auto")))
    assert not (tmp_path / MARKER).exists()
    assert_equal_states(tmp_path / "checkpoint.pth", undisturbed / "checkpoint.pth")
    assert scores(tmp_path) == scores(undisturbed)


def test_the_time_limit_stops_a_run(data_path, tmp_path, undisturbed, monkeypatch):
    """On a clock where a step takes a minute."""
    clock = SimpleNamespace(minutes=0.0)
    clock.monotonic = lambda: 60 * clock.minutes
    update = train.TrainingState.optimizer_step

    def slow_update(state):
        clock.minutes += 1
        return update(state)

    monkeypatch.setattr(interruption, "time", clock)
    monkeypatch.setattr(train.TrainingState, "optimizer_step", slow_update)
    for stop in (3, 6):
        flags = ["--resume", "auto", "--time-limit", 2.5, "--epochs", 3, "--max-steps", 7]
        with pytest.raises(Interrupted, match=f"the --time-limit is reached; everything is saved after {stop} steps"):
            train.main(train.parse_args(arguments(data_path, tmp_path, *flags)))
    assert_equal_states(tmp_path / "checkpoint.pth", undisturbed / "checkpoint.pth")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    """Unless it comes within a second, by another way."""
    clock = SimpleNamespace(now=50.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(interruption, "time", clock)
    with Interruption(tmp_path, None) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        clock.now += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.vote() == signal.SIGINT
        clock.now += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        clock.now += 5
        os.kill(os.getpid(), signal.SIGTERM)  # as schedulers may do
        assert watch.vote() == signal.SIGTERM < TIME_IS_UP


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_its_checkpoint(data_path, tmp_path):
    terminal, end = os.openpty()
    command = ["train.py", *arguments(data_path, tmp_path, "--print-freq", 1, model=SMALL)]
    process = subprocess.Popen(
        [*launcher(1), *command], cwd=ROOT, stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    seen = b""
    while b"Epoch: [0]  [2/4]" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # as the kernel does for the terminal of a shell
    assert process.wait(60) == EXIT_INTERRUPTED
    assert step_of(read_checkpoint(tmp_path / "checkpoint.pth")) >= 2


@pytest.fixture(scope="module")
def checkpoint(undisturbed):
    """Of a model that evaluate.py knows: its name is looked up in this process only."""
    path = undisturbed / "resnet.pth"
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=7)
    content = load(undisturbed / "checkpoint.pth")
    ssd.save_file(content | {"model": model.state_dict(), "args": {"model": "ssd300_resnet18"}}, path)
    return path


def hanging_images(data_path, tmp_path) -> tuple[Path, Path]:
    """A copy of the data set whose images are pipes, and the first of the images to validate on."""
    copy = tmp_path / "data"
    shutil.copytree(data_path, copy)
    for path in copy.glob("*2017/*"):
        path.unlink()
        os.mkfifo(path)
    return copy, min((copy / "val2017").iterdir())


def interrupt_when_opened(pipe: Path, process: subprocess.Popen) -> None:
    """Sends Ctrl-C when somebody reads the pipe, as who wants to decode an image does, and leaves him waiting."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # there is no reader yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
            os.close(writer)
            return
        time.sleep(0.05)
    raise AssertionError(process.stdout.read())


@pytest.mark.parametrize(
    ("command", "workers", "processes"),
    [
        ("evaluate.py --checkpoint {}", 0, 1),
        ("evaluate.py --checkpoint {}", 1, 1),
        ("evaluate.py --checkpoint {}", 1, 2),
        ("train.py --test-only --resume {}", 1, 1),
    ],
)
def test_ctrl_c_ends_an_evaluation_with_one_line(data_path, tmp_path, checkpoint, command, workers, processes):
    """While it waits for an image, in the process itself or in a worker."""
    copy, first = hanging_images(data_path, tmp_path)
    script, *flags = command.format(checkpoint).split()
    flags += ["--data-path", copy, "--device", "cpu", "--workers", workers, "--output-dir", tmp_path / "out"]
    process = start(script, *flags, processes=processes)
    interrupt_when_opened(first, process)
    code, console = finish(process, 60)
    assert [line for line in console.splitlines() if line.startswith(script)] == [f"{script}: stopped by Ctrl-C"]
    if processes == 1:
        assert code == EXIT_CTRL_C
        assert "Traceback" not in console


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_the_check_of_a_data_set_with_one_line(data_path, tmp_path, workers):
    copy, _ = hanging_images(data_path, tmp_path)
    process = start("train.py", "--check-data", "--data-path", copy, "--workers", workers)
    interrupt_when_opened(min((copy / "train2017").iterdir()), process)
    code, console = finish(process, 60)
    assert code == EXIT_CTRL_C
    assert console.splitlines()[1:] == ["train.py: stopped by Ctrl-C"]  # after the layout


def test_a_second_ctrl_c_ends_a_run_with_one_line(data_path, tmp_path):
    copy, _ = hanging_images(data_path, tmp_path)
    process = start("train.py", *arguments(copy, tmp_path / "out", model=SMALL))
    lines_until(process, "Learning rate")  # then it draws the first images
    os.killpg(process.pid, signal.SIGINT)
    lines_until(process, "SIGINT: stopping after this step")
    time.sleep(1.1)  # what comes within a second was sent once
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 60) == (EXIT_CTRL_C, "train.py: stopped by Ctrl-C\n")


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption(tmp_path, None) as watch:
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.vote() == 0
    signal.signal(signal.SIGHUP, before)


def test_a_run_that_was_stopped_is_not_restarted_by_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Interruption(tmp_path, None).refuse_restart()
    (tmp_path / MARKER).touch()
    with pytest.raises(Interrupted, match="before torchrun restarted it"):
        Interruption(tmp_path, None).refuse_restart()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    Interruption(tmp_path, None)  # also if it comes to nothing, so that its own restart goes on
    assert not (tmp_path / MARKER).exists()
    Interruption(tmp_path, None).refuse_restart()


def finish(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Exit code and console of a process that must end within so many seconds."""
    try:
        console, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, console


def start(*command, processes: int = 1, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(processes), *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
    )


def lines_until(process: subprocess.Popen, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: " + "".join(lines))


def test_a_signal_to_all_processes_of_a_run_leaves_the_loader_workers_at_work(data_path, tmp_path):
    """As Ctrl-C in a terminal and SLURM send it; torchrun's reaches the whole group of each process, too."""
    process = start("train.py", *arguments(data_path, tmp_path, "--workers", 2, "--print-freq", 1, model=SMALL))
    lines_until(process, "Epoch: [0]  [2/4]")
    os.killpg(process.pid, signal.SIGTERM)
    code, console = finish(process, 30)
    assert code == EXIT_INTERRUPTED
    assert console.splitlines()[-1].startswith("train.py: stopped: SIGTERM; everything is saved after")
    assert "Traceback" not in console
    assert step_of(load(tmp_path / "checkpoint.pth")) >= 2


@pytest.fixture(scope="module")
def undisturbed_pair(run, data_path, tmp_path_factory):
    """What two processes make of the same flags."""
    output_dir = tmp_path_factory.mktemp("pair")
    run("-m", "tests.tiny", *arguments(data_path, output_dir), processes=2)
    return output_dir


def goes_on(run, data_path, output_dir, undisturbed_pair) -> None:
    run("-m", "tests.tiny", *arguments(data_path, output_dir, "--resume", "auto"), processes=2)
    assert_equal_states(output_dir / "checkpoint.pth", undisturbed_pair / "checkpoint.pth")
    assert scores(output_dir) == scores(undisturbed_pair)


@pytest.mark.parametrize(("moment", "call", "number"), [("batch", 1, "SIGUSR1"), ("detect", 1, "SIGTERM")])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    run, data_path, tmp_path, undisturbed_pair, moment, call, number
):
    process = start("-m", "tests.sabotage", 1, moment, call, number, *arguments(data_path, tmp_path), processes=2)
    code, console = finish(process, 120)
    assert code == 1  # torchrun's; it lists those of the processes
    assert console.count(f"exitcode  : {EXIT_INTERRUPTED}") == 2
    assert console.count("sabotage.py: stopped: ") == 1
    assert f"{number}; everything is saved after" in console
    assert (tmp_path / MARKER).exists()
    goes_on(run, data_path, tmp_path, undisturbed_pair)


def test_a_signal_to_torchrun_stops_all(data_path, tmp_path):
    """Meanwhile the run listens on the loopback interface only; torchrun's own socket is another matter."""
    command = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "train.py"]
    flags = arguments(data_path, tmp_path, "--workers", 1, "--print-freq", 1, model=SMALL)
    process = start(*command, *flags, processes=2)
    lines_until(process, "Epoch: [0]  [1/2]")
    ranks = children_of(process.pid)
    addresses = [address for pid in ranks for address in listening_addresses(pid)]
    started = time.monotonic()
    os.kill(process.pid, signal.SIGUSR1)
    code, console = finish(process, 60)
    assert time.monotonic() - started < 25  # after 30, torchrun kills
    assert code == 1
    assert "train.py: stopped: SIGUSR1; everything is saved after" in console
    assert (tmp_path / MARKER).exists()
    assert len(ranks) == 2
    assert addresses
    assert all(address.startswith(("0100007F:", "00000000000000000000000001000000:")) for address in addresses)


def test_torchrun_restarts_a_run_whose_process_was_killed(data_path, tmp_path, undisturbed_pair):
    command = ["--max-restarts=1", "-m", "tests.sabotage", 1, "step", 4, "SIGKILL"]
    flags = arguments(data_path, tmp_path, "--resume", "auto", "--checkpoint-freq", 1)
    code, console = finish(start(*command, *flags, processes=2), 180)
    assert code == 0, console
    assert "Continuing after 3 steps" in console
    assert_equal_states(tmp_path / "checkpoint.pth", undisturbed_pair / "checkpoint.pth")
    assert scores(tmp_path) == scores(undisturbed_pair)


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_it_is_saved(data_path, tmp_path):
    flags = ["--checkpoint-freq", 1, "--print-freq", 1, "--accumulate", 2, "--batch-size", 1]
    in_fourth_step = 8
    command = ["-m", "tests.sabotage", 1, "loss", in_fourth_step, "nan", *arguments(data_path, tmp_path, *flags)]
    code, console = finish(start(*command, processes=2), 120)
    assert code == 1
    assert console.count(f"exitcode  : {EXIT_NOT_FINITE}") == 2
    (line,) = (line for line in console.splitlines() if line.startswith("sabotage.py: error"))
    path = tmp_path / "not_finite_1.pth"
    assert "step 4: the loss classification is nan, images [" in line
    assert f"(kept in {path})" in line
    kept = load(path)
    assert [batch["image"].shape for batch in kept["batches"]] == [(1, 3, 64, 64)]  # the second of its two
    named = json.loads(line.split("images ")[1].split(" (kept")[0])
    assert named == [i for batch in kept["batches"] for i in batch["image_id"]]
    assert math.isnan(kept["losses"][0]["classification"])
    assert step_of(load(tmp_path / "checkpoint.pth")) == 3


def test_gradients_that_are_not_finite_stop_a_run(data_path, tmp_path, monkeypatch):
    """Where the loss is finite, as that of a weight that has become infinite after its use."""
    backward = train.TrainingState.backward

    def spoiled(state, loss):
        backward(state, loss)
        if state.global_step == 2:
            next(state.model.parameters()).grad.fill_(torch.inf)

    monkeypatch.setattr(train.TrainingState, "backward", spoiled)
    with pytest.raises(FloatingPointError, match=r"step 3: the norm of the gradients is inf, images \[.*_0.pth"):
        train.main(train.parse_args(arguments(data_path, tmp_path, "--checkpoint-freq", 1)))
    assert step_of(load(tmp_path / "checkpoint.pth")) == 2
    assert (tmp_path / "not_finite_0.pth").exists()


def test_a_full_disk_ends_all_processes_and_keeps_the_last_checkpoint(run, data_path, tmp_path):
    flags = arguments(data_path, tmp_path, "--resume", "auto", "--checkpoint-freq", 1, model=SMALL)
    run("train.py", *flags, "--max-steps", 2, processes=2)
    (tmp_path / "checkpoint.pth.tmp").symlink_to("/dev/full")
    process = start("train.py", *flags, "--print-freq", 1, processes=2)
    lines = lines_until(process, "Continuing after 2 steps")
    code, console = finish(process, 30)
    assert code == 1
    errors = [line for line in ("".join(lines) + console).splitlines() if line.startswith("train.py: error")]
    assert len(errors) == 1
    assert f"{tmp_path / 'checkpoint.pth'}: cannot be saved (No space left on device)" in errors[0]
    assert step_of(read_checkpoint(tmp_path / "checkpoint.pth")) == 2


def test_a_process_that_no_longer_answers_ends_the_others(data_path, tmp_path):
    command = ["-m", "tests.sabotage", 1, "step", 2, "SIGSTOP"]
    flags = arguments(data_path, tmp_path, "--dist-timeout", 12, "--print-freq", 1)
    process = start(*command, *flags, processes=2)
    lines_until(process, "Epoch: [0]  [1/2]")
    lines = lines_until(process, "error: ")
    for rank in children_of(process.pid):
        os.kill(rank, signal.SIGKILL)  # which torchrun would do 30 seconds later
    finish(process, 60)
    assert "sabotage.py: error: " in lines[-1]
    assert "another process of the run has ended, or no longer answers" in lines[-1]


def test_a_process_that_fails_ends_the_others(data_path, tmp_path):
    """One of them meets a bad image; the other says that it is not alone to blame."""
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(data_path), str(copy)], check=True)
    bad = sorted((copy / "train2017").iterdir())[5]
    bad.write_bytes(b"")
    code, console = finish(start("train.py", *arguments(copy, tmp_path / "out", model=SMALL), processes=2), 90)
    assert code == 1
    errors = [line for line in console.splitlines() if line.startswith("train.py: error")]
    assert len(errors) == 2
    assert any(f"{bad} (image id " in line for line in errors)
    assert any("another process of the run has ended" in line for line in errors)
    assert console.count("Traceback") == 1  # torchrun's own


def listening_addresses(pid: int) -> list[str]:
    """What /proc/net says of the sockets of a process that wait for connections: address and port, in hexadecimal."""
    sockets = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                addresses.append(fields[1])
    return addresses
