"""The object database says how large it will be; interrupted anywhere, it continues and ends with the same bytes."""

import multiprocessing
import os
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest

from cmt_aqr.data import database_writer
from cmt_aqr.data.database_writer import estimate_size, write_database
from cmt_aqr.data.sample import DataError

TOTAL = 17


class Frames:
    """Frame i has i % 4 objects; reading frame `stop_at` does `stop` instead."""

    def __init__(self, stop_at=None, stop=None):
        self.stop_at, self.stop, self.read = stop_at, stop, []

    def __len__(self):
        return TOTAL

    def __getitem__(self, item):
        self.read.append(item)
        if item == self.stop_at:
            return self.stop()
        rng = np.random.default_rng(item)
        return [
            (
                int(rng.integers(10)),
                rng.random(9, dtype=np.float32),
                rng.random((item + 1, 5), dtype=np.float32),
                rng.bytes(10 * n),
            )
            for n in range(item % 4)
        ]


@pytest.fixture(autouse=True)
def saved_every_five(monkeypatch):
    monkeypatch.setattr(database_writer, "SAVED_EVERY", 5)


def content(folder):
    """Everything that a database holds."""
    with np.load(folder / "objects.npz") as arrays:
        described = {name: arrays[name].tolist() for name in arrays}
    return described, *((folder / name).read_bytes() for name in database_writer.DATA_FILES)


@pytest.fixture
def whole(tmp_path):
    write_database(Frames(), tmp_path / "whole", 0)
    return content(tmp_path / "whole")


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_be_killed(folder, frame):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=write_database, args=(Frames(frame, kill), folder, 0))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_the_bytes_are_those_of_the_objects(whole):
    described, points, patches = whole
    objects = [one for frame in map(Frames().__getitem__, range(TOTAL)) for one in frame]
    assert described["labels"] == [label for label, *_ in objects]
    np.testing.assert_array_equal(described["boxes"], np.stack([box for _, box, _, _ in objects]))
    assert points == b"".join(points.tobytes() for _, _, points, _ in objects)
    assert patches == b"".join(patch for *_, patch in objects)
    assert np.diff(described["point_offsets"]).tolist() == [len(points) for _, _, points, _ in objects]
    assert np.diff(described["patch_offsets"]).tolist() == [len(patch) for *_, patch in objects]


@pytest.mark.parametrize("frame", [0, 4, 5, 6, 12, 16])
@pytest.mark.parametrize("cause", ["kill", "stop", "broken file"])
def test_a_build_continues_where_it_was_interrupted(tmp_path, whole, frame, cause):
    folder = tmp_path / "database"
    if cause == "kill":
        write_and_be_killed(folder, frame)
    elif cause == "stop":
        with pytest.raises(KeyboardInterrupt):
            write_database(Frames(frame, interrupt), folder, 0)
    else:
        with pytest.raises(DataError, match="is truncated"):
            write_database(Frames(frame, lambda: DataError("x.bin is truncated")), folder, 0)
    assert not folder.exists()
    frames = Frames()
    write_database(frames, folder, 0)
    assert frames.read == list(range(frame // 5 * 5, TOTAL))
    assert content(folder) == whole
    assert [path.name for path in tmp_path.iterdir() if "database" in path.name] == ["database"]


def test_it_continues_after_every_of_many_kills_and_with_workers(tmp_path, whole):
    folder = tmp_path / "database"
    for frame in (3, 7, 8, 13, 16):
        write_and_be_killed(folder, frame)
    write_database(Frames(), folder, 2)
    assert content(folder) == whole


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


# What a crash or somebody's hand can leave of a build that had saved ten frames -> the frame that is read next.
LEFT = {
    "more bytes than counted": (lambda folder: (folder / "points.bin").open("ab").write(b"half a point"), 10),
    "half a description beside the old one": (lambda folder: (folder / ".objects.npz.part").write_bytes(b"PK"), 10),
    "fewer points than counted": (lambda folder: cut(folder / "points.bin", 100), 0),
    "no patches": (lambda folder: (folder / "patches.bin").unlink(), 0),
    "half a description": (lambda folder: cut(folder / "objects.npz", 300), 0),
    "an empty description": (lambda folder: cut(folder / "objects.npz", 0), 0),
    "no description": (lambda folder: (folder / "objects.npz").unlink(), 0),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_half_written_is_never_taken(tmp_path, whole, name):
    damage, first = LEFT[name]
    folder = tmp_path / "database"
    with pytest.raises(KeyboardInterrupt):
        write_database(Frames(12, interrupt), folder, 0)
    damage(tmp_path / "database.unfinished")
    frames = Frames()
    write_database(frames, folder, 0)
    assert frames.read[0] == first
    assert content(folder) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["objects.npz", "patches.bin", "points.bin"]


def test_a_build_that_lacked_its_new_name_only(tmp_path, whole):
    shutil.move(tmp_path / "whole", tmp_path / "database.unfinished")
    frames = Frames()
    write_database(frames, tmp_path / "database", 0)
    assert frames.read == [] and content(tmp_path / "database") == whole


def full_disk(monkeypatch, call):
    calls = []

    def fsync(file):
        calls.append(file)
        if len(calls) > call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(database_writer.os, "fsync", fsync)


def test_a_full_disk_keeps_what_is_saved(tmp_path, whole, monkeypatch):
    folder = tmp_path / "database"
    full_disk(monkeypatch, 7)  # three files are synchronised for every state
    sentence = (
        f"^{folder}: the object database cannot be written: No space left on device; 10 of 17 frames are kept, and the "
        f"next start continues after them$"
    )
    with pytest.raises(DataError, match=sentence):
        write_database(Frames(), folder, 0)
    monkeypatch.undo()
    monkeypatch.setattr(database_writer, "SAVED_EVERY", 5)
    frames = Frames()
    write_database(frames, folder, 0)
    assert frames.read[0] == 10 and content(folder) == whole


def test_a_disk_that_is_full_from_the_start_keeps_nothing(tmp_path, monkeypatch):
    full_disk(monkeypatch, 0)
    with pytest.raises(DataError, match=r"No space left on device; nothing is kept$"):
        write_database(Frames(), tmp_path / "database", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_is_one_sentence(tmp_path):
    sentence = (
        r"^a data worker \(pid [0-9, ]+\) was killed, most likely by lack of memory; lower data.workers or free some "
        r"memory; the next start continues the object database where it stopped$"
    )
    with pytest.raises(DataError, match=sentence):
        write_database(Frames(8, kill), tmp_path / "database", 1)


def test_the_size_is_estimated_from_frames_spread_over_the_split(monkeypatch):
    frames = Frames()
    sizes = [sum(points.nbytes + len(patch) for *_, points, patch in frames[i]) for i in range(TOTAL)]
    monkeypatch.setattr(database_writer, "NUM_PROBED", TOTAL)
    assert estimate_size(frames) == sum(sizes)
    monkeypatch.setattr(database_writer, "NUM_PROBED", 2)
    assert estimate_size(frames) == pytest.approx((sizes[4] + sizes[12]) * TOTAL / 2)
    assert estimate_size(Frames(4, lambda: DataError("broken"))) == pytest.approx(sizes[12] * TOTAL / 2)


Usage = namedtuple("Usage", "total used free")


def test_the_size_is_stated_before_anything_is_written(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "database"
    free = Usage(0, 0, 4.56e9)
    monkeypatch.setattr(database_writer, "LARGE", TOTAL)
    monkeypatch.setattr(database_writer, "estimate_size", lambda frames: 1.23e9)
    monkeypatch.setattr(database_writer.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(KeyboardInterrupt):
        write_database(Frames(12, interrupt), folder, 0)
    assert capsys.readouterr().err == (
        f"cutting the object database out of 17 frames into {folder}.unfinished, about 1.2 GB; 4.6 GB are free there\n"
    )
    free = Usage(0, 0, 0)
    write_database(Frames(), folder, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"the object database in {folder}.unfinished continues after frame 10 of 17, about 0.0 GB more; 0.0 GB are "
        f"free there, which may not be enough"
    )
    assert lines[1].startswith(f"object database {folder}: car ") and len(lines) == 2


def test_a_small_one_is_silent(tmp_path, capsys):
    write_database(Frames(), tmp_path / "database", 0)
    assert capsys.readouterr() == ("", "")
