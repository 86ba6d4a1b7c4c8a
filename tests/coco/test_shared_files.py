import multiprocessing
import pickle
import re
from pathlib import Path

import pytest

from coco import shared_files
from coco.shared_files import SharedFiles, read_files


@pytest.fixture
def paths(tmp_path):
    """Three files, the second of which is empty and the third missing, and a fourth."""
    for name, content in (("a", b"one"), ("b", b""), ("d", bytes(range(256)) * 1000)):
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in "abcd"]


EXPECTED = [b"one", b"", b"", bytes(range(256)) * 1000]


def test_content_is_that_of_the_files(paths):
    files = SharedFiles(*read_files(paths))
    assert [files[i] for i in range(4)] == EXPECTED


def test_nothing_to_read():
    SharedFiles(*read_files([]))


def contents(files: SharedFiles) -> list[bytes]:
    return [files[i] for i in range(4)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_share_the_memory(paths, method):
    files = SharedFiles(*read_files(paths))
    assert len(pickle.dumps(files)) < 1000
    for path in paths:
        path.unlink(missing_ok=True)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(contents, (files,)) == EXPECTED


def shared_memory() -> int:
    """Bytes in use on this machine."""
    return 1024 * int(re.search(r"^Shmem: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])


def read_and_wait(path, connection) -> None:
    connection.send(read_files([path]))
    connection.recv()


def test_nothing_stays_behind_a_process_that_is_killed(tmp_path):
    size = 200 * 2**20
    (tmp_path / "large").write_bytes(bytes(size))
    before = shared_memory()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=read_and_wait, args=(tmp_path / "large", theirs))
    process.start()
    files = SharedFiles(*ours.recv())
    assert len(files[0]) == size
    assert shared_memory() - before > 0.9 * size
    process.kill()
    process.join()
    assert len(files[0]) == size  # we still use it
    del files
    assert shared_memory() - before < 0.1 * size


def test_what_does_not_fit_is_refused(paths, monkeypatch):
    monkeypatch.setattr(shared_files, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"--cache ram: the images take 0\.0 GiB, but 0\.0 GiB of memory are free"):
        read_files(paths)


def test_free_memory():
    assert 2**20 < shared_files.free_memory() < 2**50


def test_files_that_change_size_while_they_are_read_leave_the_others_whole(paths, monkeypatch):
    monkeypatch.setattr(shared_files, "size_of", lambda path: 10)
    files = SharedFiles(*read_files(paths))
    assert contents(files) == [b"one", b"", b"", bytes(range(10))]


def test_a_folder_is_no_file(tmp_path):
    assert SharedFiles(*read_files([tmp_path]))[0] == b""
