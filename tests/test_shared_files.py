import multiprocessing
import os
import pickle

import pytest

import shared_files
from shared_files import SharedFiles, read_files


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
    assert len(pickle.dumps(files)) < 500
    for path in paths:
        path.unlink(missing_ok=True)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(contents, (files,)) == EXPECTED


def read_and_name(paths, connection) -> None:
    connection.send(read_files(paths)[0])
    connection.recv()


def test_the_memory_is_freed_with_its_process(paths):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=read_and_name, args=(paths, theirs))
    process.start()
    memory = ours.recv()
    assert os.path.exists(memory)
    process.kill()
    process.join()
    assert not os.path.exists(memory)


def test_what_does_not_fit_is_refused(paths, monkeypatch):
    monkeypatch.setattr(shared_files, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"--cache ram: the images take 0\.0 GiB, but 0\.0 GiB of memory are free"):
        read_files(paths)


def test_free_memory():
    assert 2**20 < shared_files.free_memory() < 2**50


def test_a_file_that_grows_while_it_is_read_leaves_the_others_whole(paths, monkeypatch):
    monkeypatch.setattr(shared_files, "size_of", lambda path: 2)
    files = SharedFiles(*read_files(paths))
    assert [files[i] for i in range(4)] == [b"on", b"\0\0", b"\0\0", b"\0\1"]
