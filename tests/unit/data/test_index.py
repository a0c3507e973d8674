import builtins
import dataclasses
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import socket
import threading
import time
import weakref
import zlib

import numpy as np
import pytest
import torch

from cmt_aqr import nuscenes_tables
from cmt_aqr.boxes import points_in_boxes
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.cache import exclusive_lock
from cmt_aqr.data.index import Frame, open_index
from cmt_aqr.data.nuscenes import MAX_SWEEPS, load_index
from cmt_aqr.data.readers import load_points, read_points
from cmt_aqr.data.sample import DataError
from tests.unit.data.conftest import index_of
from tests.unit.data.world import (
    CAR_VELOCITY,
    KEY_INTERVAL,
    SWEEP_INTERVAL,
    VERSION,
    car_position,
    to_lidar,
    write_world,
)


def test_boxes_and_projections_of_a_real_frame(real_frame, tmp_path):
    infos = json.loads((real_frame / "infos.json").read_text())
    index = load_index(
        dataroot=real_frame,
        version="v1.0-mini",
        split="one_frame",
        cache_dir=tmp_path,
        velocity_file=real_frame / "velocities.json",
    )
    (frame,) = (index.frame(i) for i in range(len(index)))
    assert frame.token == infos["sample_token"] and frame.timestamp == infos["timestamp_us"]
    truth = {o["annotation_token"]: o for o in infos["objects"] if o["class_name"] is not None}
    assert sorted(frame.annotations) == sorted(truth)
    rows = [truth[token] for token in frame.annotations]
    expected = [o["center_lidar"] + o["size_lwh"] + [o["yaw_lidar"]] for o in rows]
    velocities = [o["velocity_lidar_xy"] or [math.nan, math.nan] for o in rows]
    boxes = np.array(frame.boxes, dtype=float)
    np.testing.assert_allclose(boxes[:, :7], expected, atol=1e-6)
    np.testing.assert_allclose(boxes[:, 7:], velocities, atol=1e-6)
    assert [CLASSES[label] for label in frame.labels] == [o["class_name"] for o in rows]
    assert frame.chosen("lidar_or_radar").tolist() == [o["valid"] for o in rows]
    assert len(frame.targets("lidar_or_radar").labels) == sum(o["valid"] for o in rows)
    assert [camera.channel for camera in frame.cameras] == list(CAMERAS)
    centres = torch.tensor([o["center_lidar"] + [1.0] for o in rows], dtype=torch.float64)
    for camera in frame.cameras:
        stored = torch.tensor(infos["cameras"][camera.channel]["lidar2img"], dtype=torch.float64)
        ours, theirs = centres @ camera.lidar2img().T, centres @ stored.T
        ahead = theirs[:, 2] > 1
        difference = ours[ahead, :2] / ours[ahead, 2:3] - theirs[ahead, :2] / theirs[ahead, 2:3]
        # The source keeps its matrices as float32 (see its README): 2e-8 of up to 1e4 px per component.
        assert ahead.any() and difference.abs().max() < 2e-3


def test_points_in_boxes_of_a_real_frame(real_frame, tmp_path):
    index = load_index(dataroot=real_frame, version="v1.0-mini", split="mini_train", cache_dir=tmp_path)
    frame = index.frame(0)
    points = read_points(real_frame / frame.lidar_file)
    inside = points_in_boxes(points, frame.targets("all").boxes).sum(dim=0)
    counts = torch.tensor(frame.num_lidar_points)
    # The tables count in boxes that are upright on the map, ours lean with the LiDAR: a few border points differ.
    # (Swapping length and width, or a bottom centre, is off by hundreds.)
    assert (inside - counts).abs().sum() <= 0.05 * counts.sum()
    assert torch.equal(torch.isnan(frame.targets("all").boxes[:, 7]), torch.ones(len(counts), dtype=torch.bool))


def test_boxes_and_velocities_follow_the_motion(index):
    for k in range(len(index)):
        frame = index.frame(k)
        assert frame.labels == [CLASSES.index("car"), CLASSES.index("pedestrian")]  # the trolley is no class
        time = k * KEY_INTERVAL
        car = np.array(frame.boxes[0])
        np.testing.assert_allclose(car[:3], to_lidar(car_position(time), time), atol=1e-6)
        np.testing.assert_allclose(car[3:6], [4.0, 2.0, 1.6])
        step = to_lidar(car_position(time + 1e-3), time) - to_lidar(car_position(time), time)
        np.testing.assert_allclose(car[7:], 1e3 * step[:2], atol=1e-5)
        assert np.hypot(*car[7:]) == pytest.approx(np.hypot(*CAR_VELOCITY), rel=1e-3)
        # It drives along its heading; the yaw of a leaning frame is off by less than a milliradian.
        assert math.cos(car[6] - math.atan2(car[8], car[7])) > 1 - 1e-5
        assert frame.boxes[1][7:] == pytest.approx([0, 0], abs=1e-6)
        assert frame.targets("lidar_or_radar").labels.tolist() == [CLASSES.index("car")]  # nobody saw the pedestrian
    assert index.frame_labels("lidar_or_radar") == [[CLASSES.index("car")]] * 3


def test_sweeps_are_the_most_recent_and_align_static_points(world, index):
    assert [len(index.frame(k).sweeps) for k in range(3)] == [0, 10, MAX_SWEEPS]
    frame = index.frame(2)
    lags = [sweep.time_lag for sweep in frame.sweeps]
    np.testing.assert_allclose(lags, SWEEP_INTERVAL * np.arange(1, 11), atol=1e-9)
    points = load_points(frame, world.root, num_sweeps=3, close_radius=1.0)
    per_sweep = len(world.wall) + 30
    assert len(points) == 4 * per_sweep + 1  # the own-vehicle point stays in the key frame only
    assert torch.equal(points[: per_sweep + 1, 4], torch.zeros(per_sweep + 1))
    wall = torch.from_numpy(to_lidar(world.wall, 2 * KEY_INTERVAL)).float()
    for k in range(4):
        start = k * per_sweep + (k > 0)
        torch.testing.assert_close(points[start : start + len(wall), :3], wall, atol=2e-5, rtol=0)
        assert points[start, 4].item() == pytest.approx(k * SWEEP_INTERVAL)
        assert points[start, 3].item() == 7
    moved = points[per_sweep + 1 + len(wall), :2] - points[len(wall), :2]
    assert moved.norm().item() == pytest.approx(np.hypot(*CAR_VELOCITY) * SWEEP_INTERVAL, rel=1e-2)
    assert len(load_points(frame, world.root, num_sweeps=3, close_radius=0)) == 4 * (per_sweep + 1)
    assert len(load_points(index.frame(0), world.root, num_sweeps=9, close_radius=1.0)) == per_sweep + 1


def test_json_round_trip(index):
    frame = index.frame(1)
    assert Frame.from_json(frame.to_json()) == frame


def test_velocity_file_overrides(world, tmp_path):
    path = tmp_path / "velocities.json"
    tokens = ["scene-a-sample-1-car", "scene-a-sample-2-car"]
    path.write_text(
        json.dumps({tokens[0]: {"velocity_global_xy": [0.0, 2.0]}, tokens[1]: {"velocity_global_xy": None}})
    )
    index = index_of(world, tmp_path / "cache", velocity_file=path)
    plain = index_of(world, tmp_path / "cache")
    assert np.hypot(*index.frame(1).boxes[0][7:]) == pytest.approx(2, rel=1e-3)
    assert index.frame(2).boxes[0][7:] == [None, None]
    assert index.frame(0).boxes == plain.frame(0).boxes
    assert torch.isnan(index.frame(2).targets("all").boxes[0, 7:]).all()
    path.write_text(json.dumps({tokens[0]: [1, 2]}))
    with pytest.raises(
        DataError, match=r"velocities.json: 'scene-a-sample-1-car' has \[1, 2\], expected annotation token"
    ):
        index_of(world, tmp_path / "cache", velocity_file=path)


def test_index_is_reused_until_a_table_changes(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cmt_aqr.progress.PATIENCE", 1e-9)
    cache = tmp_path / "cache"
    first = index_of(world, cache)
    assert f"building index {first.path} (none yet): done in 00:00\n" in capsys.readouterr().err
    written = first.path.stat().st_mtime_ns
    world.table("sample").touch()  # another time stamp, same content
    assert index_of(world, cache).content_hash == first.content_hash
    assert first.path.stat().st_mtime_ns == written and capsys.readouterr().err == ""
    world.edit("sample_annotation", lambda rows: rows[0].update(num_lidar_pts=0))
    second = index_of(world, cache)
    assert "tables changed: sample_annotation" in capsys.readouterr().err
    assert second.content_hash != first.content_hash and second.frame_labels("lidar_or_radar")[0] == []
    second.path.write_bytes(second.path.read_bytes()[:-40])
    assert len(index_of(world, cache)) == 3
    assert "damaged" in capsys.readouterr().err
    assert sorted(path.name for path in cache.iterdir()) == [second.path.name]


def many_frames(frame, count, alive):
    """Copies of a frame with tokens of their own; notes in ``alive`` how many exist at a time."""
    existing = []
    for number in range(count):
        copy = dataclasses.replace(frame, token=f"token-{number}")
        existing.append(weakref.ref(copy))
        alive.append(sum(made() is not None for made in existing[-10:]))
        yield copy
        del copy


def open_many(world, frame, path, count, alive):
    return open_index(
        path,
        dataroot=world.root,
        settings={"version": VERSION, "split": "all", "cameras": list(CAMERAS), "max_sweeps": MAX_SWEEPS},
        tables={"sample": world.table("sample")},
        build=lambda: many_frames(frame, count, alive),
    )


def test_an_index_is_written_as_it_is_built_and_read_frame_by_frame(world, index, tmp_path, monkeypatch):
    alive = []
    built = open_many(world, index.frame(2), tmp_path / "many.frames", 2000, alive)
    assert len(alive) == 2000 and max(alive) <= 2
    unpacked = []
    unpack = zlib.decompress
    monkeypatch.setattr("cmt_aqr.data.index.zlib.decompress", lambda data: unpacked.append(len(data)) or unpack(data))
    opened = open_many(world, None, tmp_path / "many.frames", 0, alive)
    assert len(opened) == 2000 and len(unpacked) == 1  # the header
    for each in (built, opened):
        assert each.frame(1234) == dataclasses.replace(index.frame(2), token="token-1234")
    assert opened.frame(-1).token == "token-1999"
    with pytest.raises(IndexError):  # ends a loop over the frames
        opened.frame(2000)
    assert opened.tokens[-1] == "token-1999" and opened.frame_labels("all") == built.frame_labels("all")
    # What a worker gets where it is not forked, and may copy where it is: 100 MB would be 3 kB a frame of nuScenes.
    assert len(pickle.dumps(opened)) < 200 * 2000


def test_a_frame_that_is_damaged_later_is_named(world, tmp_path):
    index = index_of(world, tmp_path / "cache")
    content = bytearray(index.path.read_bytes())
    content[40] ^= 1
    index.path.write_bytes(content)
    opened = index_of(world, tmp_path / "cache")
    with pytest.raises(DataError) as error:
        opened.frame(0)
    assert str(error.value).startswith(f"{index.path}: frame 0, scene-a-sample-0, cannot be read: Error -3 while ")
    assert str(error.value).endswith("; delete the file, it is then built again")
    assert opened.frame(1).token == "scene-a-sample-1"


def test_two_splits_and_an_evaluation_share_the_tables(tmp_path, monkeypatch):
    splits = {"one": ["scene-a"], "two": ["scene-b"]}
    world = write_world(tmp_path / "w", scenes={"scene-a": 2, "scene-b": 1}, splits=splits)
    load, loaded = nuscenes_tables.CheckedNuScenes, []
    monkeypatch.setattr(nuscenes_tables, "CheckedNuScenes", lambda *place: loaded.append(place) or load(*place))
    for _ in range(2):  # the second time there is nothing to build
        tables = nuscenes_tables.Tables(world.root, VERSION)
        lengths = [len(index_of(world, tmp_path / "cache", split=split, tables=tables)) for split in splits]
        assert lengths == [2, 1] and len(loaded) == 1
    assert len(tables.nusc.sample) == 3 and len(loaded) == 2


def _open_and_count(world, cache, results):
    results.put(len(index_of(world, cache)))


def test_several_processes_may_build_at_once(world, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_open_and_count, args=(world, tmp_path / "c", results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [3, 3, 3]
    for worker in workers:
        worker.join()


def test_scenes_of_a_split_only(tmp_path):
    splits = {"one": ["scene-b"], "gone": ["scene-x"]}
    world = write_world(tmp_path / "w", scenes={"scene-a": 2, "scene-b": 1}, splits=splits)
    index = index_of(world, tmp_path / "cache", split="one")
    assert index.tokens == ["scene-b-sample-0"]
    assert index.frame(0).boxes[0][7:] == [None, None]  # one key frame: no velocity
    for split in ("gone", "train", "all"):
        with pytest.raises(DataError, match=rf"split '{split}' .*splits with frames there: one$"):
            index_of(world, tmp_path / "cache", split=split)


def _set(field, value):
    return lambda rows: rows[-1].update({field: value})


# A table, a change of its last row, and words the one sentence must contain.
BROKEN = [
    ("calibrated_sensor", _set("rotation", [0, 0, 0, 0]), ("calibration-LIDAR_TOP", "[0, 0, 0, 0]", "length 1")),
    ("calibrated_sensor", _set("translation", [0, math.nan, 0]), ("calibration-LIDAR_TOP", "nan", "finite")),
    ("calibrated_sensor", lambda rows: rows[0].update(camera_intrinsic=[[1, 0, 0]] * 3), ("[1, 0, 0]", "singular")),
    ("calibrated_sensor", lambda rows: rows[0].update(camera_intrinsic=[]), ("calibration-CAM_FRONT", "3 x 3")),
    ("ego_pose", _set("translation", [math.inf, 0, 0]), ("ego_pose.json", "inf", "finite")),
    ("sample_annotation", lambda rows: rows[0].update(size=[1, -2, 3]), ("sample-0-car", "[1, -2, 3]", "from 0.001")),
    ("sample_annotation", lambda rows: rows[0].update(size=[1, math.nan, 3]), ("sample-0-car", "nan", "from 0.001")),
    ("sample_annotation", lambda rows: rows[0].update(translation=[1, math.nan, 3]), ("sample-0-car", "nan", "finite")),
    ("sample_data", _set("ego_pose_token", "lost"), ("ego_pose_token 'lost'", "a token of ego_pose.json")),
    ("sample_annotation", _set("instance_token", "lost"), ("instance_token 'lost'", "a token of instance.json")),
    ("sample_data", lambda rows: rows[0].update(width=0), ("sample_data.json", "width 0", "from 1 to")),
    ("sample_data", lambda rows: rows.pop(), ("LIDAR_TOP", "'scene-a-sample-2'")),
    ("map", lambda rows: rows[0].update(filename="maps/none.png"), ("maps/none.png", "does not exist")),
    ("sensor", lambda rows: rows[0].update(channel="CAM_X"), ("sensor.json", "'CAM_FRONT'", "CAM_X")),
]  # fmt: skip


@pytest.mark.parametrize(("table", "change", "words"), BROKEN)
def test_broken_tables_are_one_sentence(world, tmp_path, table, change, words):
    world.edit(table, change)
    with pytest.raises(DataError) as error:
        index_of(world, tmp_path / "cache")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not list((tmp_path / "cache").glob("index*.frames"))


def test_missing_pieces_are_named(world, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        index_of(world, tmp_path / "cache", dataroot=tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"no version 'v9'; it has {VERSION}"):
        index_of(world, tmp_path / "cache", version="v9")
    for name in ("../../up", "", ".", "a/b", "a b"):
        with pytest.raises(DataError, match=rf"^version is '{name}', expected a name of the characters 0-9 A-Z a-z"):
            index_of(world, tmp_path / "cache", version=name)
        with pytest.raises(DataError, match=rf"^split is '{name}', expected a name of the characters 0-9 A-Z a-z"):
            index_of(world, tmp_path / "cache", split=name)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=r"velocity_file nothing\.json does not exist"):
        index_of(world, tmp_path / "cache", velocity_file="nothing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .* cannot be written: .*; name another with data\.index_dir$"):
        index_of(world, tmp_path / "file" / "cache")
    text = world.table("visibility").read_text()
    world.table("visibility").unlink()
    with pytest.raises(DataError, match=r"visibility\.json is missing"):
        index_of(world, tmp_path / "cache")
    world.table("visibility").write_text(text)
    world.table("ego_pose").write_text("[{")
    with pytest.raises(DataError, match=r"ego_pose\.json is not valid JSON"):
        index_of(world, tmp_path / "cache")


# What runs out of space -> the sentence.
FULL = {
    "content": r"/cache/index-[^/]*\.frames: the cache cannot be written: No space left on device; "
    r"name another folder with data\.index_dir$",
    "lock": r"^cache folder .*/cache cannot be written: No space left on device; name another with data\.index_dir$",
}


def test_full_disk_is_one_sentence(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(DataError, match=FULL["content"]):
            index_of(world, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(index_of(world, tmp_path / "cache")) > 0


@pytest.mark.parametrize("what", FULL)
def test_full_disk_before_the_index_is_whole(world, tmp_path, monkeypatch, what):
    """Some of the content is on the disk, or not even the holder's name."""
    opened = builtins.open

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(file, mode="r", *arguments, **options):
        ending = {"content": ".part", "lock": ".lock"}[what]
        return (
            Full(file, mode.replace("b", ""))
            if str(file).endswith(ending)
            else opened(file, mode, *arguments, **options)
        )

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_full)
        with pytest.raises(DataError, match=FULL[what]):
            index_of(world, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(index_of(world, tmp_path / "cache")) == 3


def test_an_index_that_another_process_builds_is_waited_for(world, tmp_path, caplog):
    cache, found = tmp_path / "cache", []
    path = index_of(world, tmp_path / "elsewhere").path
    with exclusive_lock(cache / path.name):
        waiting = threading.Thread(target=lambda: found.append(index_of(world, cache)))
        waiting.start()
        while "waiting" not in caplog.text:
            time.sleep(0.01)
        shutil.copy(path, cache / path.name)
    waiting.join()
    assert len(found[0]) == 3 and [path.name for path in cache.iterdir()] == [path.name]
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert caplog.messages[-1] == f"{cache / path.name} is being written by {me}: waiting for it"


def test_a_sweep_of_another_sensor_or_time_is_refused(world, tmp_path):
    def previous(rows):
        return next(row for row in rows if row["token"] == "scene-a-lidar-10")

    def refused(**values):
        world.edit("sample_data", lambda rows: previous(rows).update(values))
        with pytest.raises(DataError) as error:
            index_of(world, tmp_path / "cache")
        return str(error.value).removeprefix(f"{world.table('sample_data')}: ")

    file = world.table("sample_data").read_text()
    now = 1_600_000_000_500_000
    assert refused(prev="scene-a-sample-0-CAM_BACK") == (
        "scene-a-lidar-10 has prev scene-a-sample-0-CAM_BACK of channel CAM_BACK, expected LIDAR_TOP"
    )
    assert refused(prev="scene-a-lidar-10") == (
        f"scene-a-lidar-10 has prev scene-a-lidar-10 with timestamp {now}, expected a time before its own {now} and at "
        f"most 60 s before the key frame's {now}"
    )
    world.table("sample_data").write_text(file)
    world.edit(
        "sample_data", lambda rows: [row.update(timestamp=5) for row in rows if row["token"] == "scene-a-lidar-9"]
    )
    with pytest.raises(DataError, match=r"scene-a-lidar-10 has prev scene-a-lidar-9 with timestamp 5, expected a time"):
        index_of(world, tmp_path / "cache")


def test_choices_of_boxes(world, tmp_path):
    def edit(rows):
        for row in rows:
            if row["token"] == "scene-a-sample-0-car":
                row["num_lidar_pts"], row["num_radar_pts"] = 0, 3

    world.edit("sample_annotation", edit)
    index = index_of(world, tmp_path / "cache")
    car, pedestrian = CLASSES.index("car"), CLASSES.index("pedestrian")
    expected = {
        "lidar": [[], [car], [car]],
        "lidar_or_radar": [[car], [car], [car]],
        "all": [[car, pedestrian]] * 3,
    }
    reopened = index_of(world, tmp_path / "cache")
    for choice, labels in expected.items():
        for each in (index, reopened):
            assert each.frame_labels(choice) == labels
            assert [each.frame(i).targets(choice).labels.tolist() for i in range(3)] == labels
    torch.testing.assert_close(
        index.frame(1).targets("lidar").boxes, index.frame(1).targets("all").boxes[:1], equal_nan=True
    )
