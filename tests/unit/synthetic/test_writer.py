"""The command line and the folder it writes."""

import errno
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cmt_aqr.locks import exclusive_lock
from cmt_aqr.synthetic import WorldSettings, generate_world, writer
from cmt_aqr.synthetic import __main__ as command

TINY = {
    "scenes": 1,
    "val_scenes": 1,
    "seed": 4,
    "samples_per_scene": 11,
    "image_size": (96, 54),
    "sweeps_per_keyframe": 1,
    "lidar_columns": 90,
}
SMALLEST = [
    "--val-scenes",
    "0",
    "--samples-per-scene",
    "1",
    "--image-size",
    "64x36",
    "--sweeps",
    "0",
    "--lidar-columns",
    "36",
    "--workers",
    "0",
]


def digest(root):
    """Hashes of all files by relative path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_whatever_the_number_of_workers(tmp_path):
    generate_world(tmp_path / "a", WorldSettings(**TINY), progress=False)
    generate_world(tmp_path / "b", WorldSettings(**TINY), workers=2, progress=False)
    first, second = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert first == second
    assert sum(name.endswith(".jpg") for name in first) == 2 * 11 * 6
    assert sum(name.endswith(".bin") for name in first) == 2 * 21
    assert sum(name.startswith("v1.0-synthetic/") for name in first) == 14

    generate_world(tmp_path / "c", WorldSettings(**{**TINY, "seed": 5}), progress=False)
    third = digest(tmp_path / "c")
    tables = ("sample", "sample_data", "ego_pose", "sample_annotation", "instance", "scene")
    assert all(first[f"v1.0-synthetic/{name}.json"] != third[f"v1.0-synthetic/{name}.json"] for name in tables)
    assert not {value for name, value in first.items() if name.startswith("s")} & {
        value for name, value in third.items() if name.startswith("s") and name != "synthetic.json"
    }


@pytest.mark.parametrize("name", ["inv", "solve", "lstsq", "qr", "svd", "det"])
def test_nothing_wakes_the_threads_of_linear_algebra(tmp_path, monkeypatch, name):
    """On a matrix of any size they start one thread a core, which then waits by spinning: half the samples a second."""
    monkeypatch.setattr(f"numpy.linalg.{name}", None)
    generate_world(tmp_path / "w", WorldSettings(**{**TINY, "samples_per_scene": 1}), progress=False)


def test_validation_scenes_do_not_depend_on_the_number_of_training_scenes(tmp_path):
    small = {**TINY, "samples_per_scene": 2}
    generate_world(tmp_path / "a", WorldSettings(**small), progress=False)
    generate_world(tmp_path / "b", WorldSettings(**{**small, "scenes": 0}), progress=False)
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    val = [name for name in a if "synthetic-val" in name]
    assert len(val) == 2 * 6 + 3 and all(a[name] == b[name] for name in val)


def test_a_finished_world_is_kept_and_another_is_refused(tmp_path, capsys):
    options = ["--scenes", "1", *SMALLEST]
    out = tmp_path / "w"
    assert command.main([str(out), *options]) == 0
    before = digest(out)
    line = capsys.readouterr().err
    assert "1 samples" in line and "samples/s" in line and str(out) in line
    assert command.main([str(out), *options]) == 0
    assert "is there already" in capsys.readouterr().err
    assert command.main([str(out), *options, "--seed", "9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed is 0 there, 9 here" in error
    assert digest(out) == before
    manifest = json.loads((out / "synthetic.json").read_text())
    assert manifest["generator_version"] == writer.GENERATOR_VERSION
    assert manifest["lidar_columns"] == 36 and manifest["counts"]["sample"] == 1


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert command.main([str(tmp_path), "--workers", "0"]) == 2
    assert "not a synthetic world" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image-size", "1600"], ["--image-size", "1600x900", "'1600'"]),
        (["--image-size", "0x0"], ["image width", "0"]),
        (["--scenes", "-1"], ["scenes", "-1"]),
        (["--scenes", "0", "--val-scenes", "0"], ["nothing to write"]),
        (["--scenes", "two"], ["--scenes", "'two'"]),
        (["--sweeps", "99"], ["sweeps_per_keyframe", "99"]),
        (["--samples-per-scene", "0"], ["samples_per_scene", "0"]),
        (["--lidar-columns", "1"], ["lidar_columns", "1"]),
        (["--workers", "-3"], ["workers", "-3"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_options_are_one_sentence_and_status_2(tmp_path, capsys, options, words):
    try:
        status = command.main([str(tmp_path / "w"), *options])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "w").exists()


def test_an_unwritable_place_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main([str(tmp_path / "file" / "w"), "--workers", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    original, calls = writer.record_block, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writer, "record_block", interrupted)
    assert command.main([str(tmp_path / "w"), "--scenes", "2", *SMALLEST]) == 130
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_gone_after_the_next(tmp_path):
    left = tmp_path / ".w.part" / "samples" / "LIDAR_TOP"
    left.mkdir(parents=True)
    (left / "half.pcd.bin").write_bytes(b"half")
    assert command.main([str(tmp_path / "w"), "--scenes", "1", *SMALLEST]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert not list((tmp_path / "w").rglob("half*"))


@pytest.mark.parametrize("name", ["samples/LIDAR_TOP", "samples/CAM_BACK", "sample_data.json", "splits.json", "blank"])
def test_full_disk_is_one_sentence_with_the_file_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    write = Path.write_bytes

    def until_full(path, data):
        if name in str(path):
            write(path, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    assert command.main([str(tmp_path / "w"), "--scenes", "1", *SMALLEST]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and "no space left on device; nothing is kept" in error
    assert f"error: {tmp_path}/w: the world cannot be written: {tmp_path}/.w.part/" in error
    assert list(tmp_path.iterdir()) == []


def test_a_world_that_another_process_writes_is_waited_for(tmp_path, caplog):
    out = tmp_path / "w"

    def never(holder):
        raise AssertionError(holder)

    with exclusive_lock(tmp_path / ".w.lock", on_wait=never):
        settings = WorldSettings(**{**TINY, "samples_per_scene": 1})
        waiting = threading.Thread(target=generate_world, args=(out, settings), kwargs={"progress": False})
        waiting.start()
        while not caplog.text:
            time.sleep(0.01)
        assert not out.exists()
    waiting.join()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert [record.getMessage() for record in caplog.records] == [f"{out} is being written by {me}: waiting for it"]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--scenes N",
        "--val-scenes M",
        "--seed S",
        "--image-size WxH",
        "(default: 1600x900)",
        "(default: 1084)",
        "--workers W",
        "--sweeps K",
        "(default: 20)",
    ):
        assert words in text
