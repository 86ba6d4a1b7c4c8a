import checkpoints


def test_earlier_runs_are_set_aside_under_free_names(tmp_path, capsys):
    for name in ("previous-1", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint.pth").touch()
    (tmp_path / "notes.txt").touch()
    files = [tmp_path / "pictures", tmp_path / "checkpoint.pth"]
    checkpoints.set_aside(tmp_path, files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1", "previous-2"]
    assert sorted(path.name for path in (tmp_path / "previous-2").iterdir()) == ["checkpoint.pth", "pictures"]
    assert "previous-2" in capsys.readouterr().out
    checkpoints.set_aside(tmp_path, [])
    assert not (tmp_path / "previous-3").exists()
