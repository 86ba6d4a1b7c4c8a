"""Consoles that take nothing, lack letters, or are gone, and output folders that cannot be written."""

import io
import os
import subprocess
import sys

import pytest

from engine import output
from tests.conftest import ROOT, SMALL


def printed(path, encoding: str, text: str) -> bytes:
    """What reaches a file that ``text`` is printed to, through a stream of this encoding."""
    with open(path, "w", encoding=encoding) as file:
        stream = output.unfailing(file)
        print(text, file=stream, flush=True)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "a 猫 é", b"a ? ?\n"),
        ("latin-1", "a 猫 é", b"a ? \xe9\n"),
        ("cp1252", "€ 猫", b"\x80 ?\n"),
        ("utf-8", "猫 \ud800 \udcff", "猫 ? ?\n".encode()),
    ],
)
def test_letters_that_the_encoding_lacks_become_question_marks(tmp_path, encoding, text, expected):
    assert printed(tmp_path / "log", encoding, text) == expected


def test_a_full_disk_and_a_closed_stream_take_everything():
    with open("/dev/full", "w") as full:
        for stream in (full, None):
            print("text", file=output.unfailing(stream), flush=True)


def test_a_pipe_that_does_not_block_gets_everything():
    """As another program may have made a terminal. It holds 64 KiB."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "x" * 300_000
    with subprocess.Popen([sys.executable, "-c", "print(len(input()))"], stdin=reader, stdout=subprocess.PIPE) as child:
        os.close(reader)
        with open(writer, "w") as file:
            print(text, file=output.unfailing(file), flush=True)
        assert int(child.stdout.read()) == len(text)


def test_streams_of_others_stay(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    output.keep_console_from_failing()
    assert sys.stdout is stream


def run_into(stdout, stderr, *command, **environment) -> int:
    """The exit code of a script with these streams."""
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment, timeout=120).returncode


@pytest.fixture
def gone():
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize(
    "command",
    ["train.py --recipe list", "train.py --help", "evaluate.py --help", "train.py --check-data --data-path {} -j 1"],
)
def test_a_reader_that_has_gone_is_no_error(gone, data_path, tmp_path, command, buffering):
    with open(tmp_path / "errors", "w+") as errors:
        assert run_into(gone, errors, *command.format(data_path).split(), **buffering) == 0
        assert (tmp_path / "errors").read_text() == ""
    assert run_into(gone, gone, *command.format(data_path).split(), **buffering) == 0


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "1>/dev/full 2>/dev/full"])
def test_a_run_needs_no_console(run, data_path, tmp_path, closed):
    flags = [*SMALL, "--data-path", data_path, "--max-steps", 1, "--workers", 1, "--output-dir", tmp_path / "out"]
    command = [sys.executable, "train.py", *map(str, flags)]
    subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "out/best.pth").exists()


def test_an_error_needs_no_console_either(gone, tmp_path):
    assert run_into(gone, gone, "train.py", "--epochs", 0) == 2
    assert run_into(gone, gone, "evaluate.py", "--checkpoint", "nowhere", "--output-dir", tmp_path) == 1


@pytest.mark.parametrize(
    ("in_the_way", "named"), [(None, ""), ("metrics.json", "metrics.json"), ("pictures", "pictures")]
)
def test_an_output_folder_is_tried(tmp_path, in_the_way, named):
    folder = tmp_path / "out"
    if in_the_way is None:
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / in_the_way).mkdir() if "." in in_the_way else (folder / in_the_way).touch()
    with pytest.raises(ValueError, match=rf"^{folder / named}: cannot be written \(.*another --output-dir$"):
        output.prepare(folder, ["metrics.json"], folders=["pictures"])


@pytest.mark.parametrize("path", ["a" * 300, "file/out"])
def test_an_output_folder_that_cannot_be_made(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        output.prepare(tmp_path / path)


def test_the_trial_leaves_results_as_they_were(tmp_path):
    folder = tmp_path / "new/out"
    output.prepare(folder, ["metrics.json"])
    assert list(folder.iterdir()) == []
    (folder / "metrics.json").write_text("{}")
    output.prepare(folder, ["metrics.json"], folders=["pictures"])
    assert (folder / "metrics.json").read_text() == "{}"
    assert list((folder / "pictures").iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "command",
    ["train.py --weights-backbone none", "evaluate.py --checkpoint x", "evaluate.py --checkpoint x --images {}"],
)
def test_an_output_folder_that_is_a_file_ends_a_script_before_it_works(run, data_path, tmp_path, command, processes):
    file = tmp_path / "out"
    file.touch()
    flags = ["--data-path", data_path, "--device", "cpu", "--output-dir", file]
    result = run(*command.format(data_path / "val2017").split(), *flags, processes=processes, fails=True)
    errors = [line for line in result.stderr.splitlines() if ".py: error" in line]
    assert len(errors) == 1
    assert f"error: {file}: cannot be written (File exists); mend that, or name another --output-dir" in errors[0]
    assert result.stdout == ""
