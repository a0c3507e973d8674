import os

import pytest

from cmt_aqr.files import atomic_path


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    for content in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text(content)
            assert not path.exists() if content == "old" else path.read_text() == "old"
        assert path.read_text() == content and _names(path.parent) == ["a.json"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with atomic_path(tmp_path / "objects") as temporary:
        temporary.mkdir()
        (temporary / "points.bin").write_bytes(b"1")
        assert not (tmp_path / "objects").exists()
    assert _names(tmp_path) == ["objects"] and _names(tmp_path / "objects") == ["points.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError(), KeyboardInterrupt()])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(type(error)), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise error
    with pytest.raises(type(error)), atomic_path(tmp_path / "nothing yet"):
        raise error
    assert _names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    rename = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("content", os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), rename(*names)))
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("four")
    assert done == [("content", 4), "name"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as left:
        raise ZeroDivisionError
    left.write_text("half of a file that is longer")
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert _names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"
