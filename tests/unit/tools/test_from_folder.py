"""A folder of own recordings becomes a data set that the project reads as it was meant; mistakes are one sentence."""

import json

import numpy as np
import pytest
import torch

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import load_points
from cmt_aqr.tools.from_folder import main


@pytest.fixture
def folder(tmp_path):
    """The example of the program."""
    assert main(["--example", str(tmp_path / "mine")]) == 0
    return tmp_path / "mine"


def edit(folder, change):
    path = folder / "frames.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def convert(folder):
    return main([str(folder), str(folder.parent / "own")])


def open_split(folder, split):
    root = folder.parent / "own"
    return load_index(dataroot=root, version="v1.0-own", split=split, cache_dir=folder.parent / "cache")


def test_boxes_points_and_calibration_arrive_unchanged(folder, capsys):
    # The vehicle turns left by 90 degrees and drives: what is given in its frame must come back in its frame.
    pose = [[0, -1, 0, 100], [1, 0, 0, 200], [0, 0, 1, 3], [0, 0, 0, 1]]
    content = edit(folder, lambda content: [frame.update(ego2global=pose) for frame in content["frames"]])
    assert convert(folder) == 0
    assert "own: 2 scenes, 3 frames, 3 boxes" in capsys.readouterr().out
    index = open_split(folder, "own_train")
    assert len(index) == 2 and len(open_split(folder, "own_val")) == 1
    for number in range(2):
        frame, given = index.frame(number), content["frames"][number]
        box = given["boxes"][0]
        # The car moves 3 m ahead in half a second.
        expected = [*box["center"], *box["size"], box["yaw"], 0, 6]
        targets = frame.targets("lidar")
        torch.testing.assert_close(targets.boxes, torch.tensor([expected], dtype=torch.float32), atol=1e-5, rtol=0)
        assert [CLASSES[label] for label in targets.labels] == ["car"]
        assert 200 <= frame.num_lidar_points[0] < 230
        points = load_points(frame, index.dataroot, num_sweeps=0, close_radius=1.0)
        given_points = np.fromfile(folder / given["points"], dtype=np.float32).reshape(-1, 4)
        assert np.array_equal(points[:, :4].numpy(), given_points)
        for channel, camera in zip(CAMERAS, frame.cameras, strict=True):
            known = content["cameras"][channel]
            intrinsic = np.eye(4)
            intrinsic[:3, :3] = known["intrinsic"]
            expected = torch.from_numpy(intrinsic @ np.array(known["lidar2cam"]))
            torch.testing.assert_close(camera.lidar2img(), expected, atol=1e-6, rtol=1e-6)
            assert (camera.height, camera.width) == (90, 160)


def test_a_missing_view_png_and_untracked_boxes(folder):
    def change(content):
        import cv2

        frame = content["frames"][0]
        del frame["images"]["CAM_BACK"]
        cv2.imwrite(str(folder / "front.png"), np.full((90, 160, 3), 50, np.uint8))
        frame["images"]["CAM_FRONT"] = "front.png"
        del frame["boxes"][0]["track"]

    edit(folder, change)
    assert convert(folder) == 0
    frame = open_split(folder, "own_train").frame(0)
    files = {camera.channel: camera.file for camera in frame.cameras}
    assert files["CAM_BACK"] is None and files["CAM_FRONT"].endswith(".jpg")
    assert torch.isnan(frame.targets("all").boxes[0, 7:]).all()  # seen once: no velocity


def first(change):
    return lambda content: change(content["frames"][0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(frames=[]), "frames.json: frames is empty, expected at least one frame"),
        (lambda content: content["cameras"].pop("CAM_BACK"), "frames.json: cameras: CAM_BACK is missing"),
        (
            lambda content: content["cameras"]["CAM_FRONT"].update(intrinsic=[[1, 0], [0, 1]]),
            "cameras: CAM_FRONT: intrinsic is [[1, 0], [0, 1]], expected finite numbers: 3 x 3",
        ),
        (
            lambda content: content["cameras"]["CAM_FRONT"]["lidar2cam"][0].__setitem__(0, 5.0),
            "cameras: CAM_FRONT: lidar2cam is no rotation and translation, expected orthogonal rows of length 1",
        ),
        (first(lambda frame: frame.update(points="no.bin")), "frame 0: points: "),
        (
            first(lambda frame: frame["images"].update(FRONT="a.jpg")),
            "images has 'FRONT', expected one of CAM_FRONT",
        ),
        (first(lambda frame: frame["images"].update(CAM_BACK="a.jpg")), "a.jpg does not exist or is no image"),
        (first(lambda frame: frame.update(split="own_val")), "frame 1: split is 'own_train', other frames of scene"),
        (first(lambda frame: frame.update(time=0.5)), "frame 1: time 0.5 is that of another frame of scene 'train'"),
        (first(lambda frame: frame.update(time=float("nan"))), "frame 0: time is nan, expected finite numbers: one"),
        (first(lambda frame: frame["boxes"][0].update({"class": "cars"})), "did you mean 'car'?"),
        (first(lambda frame: frame["boxes"][0].update(size=[4, 0, 1])), "box 0: size is [4, 0, 1], expected length"),
        (first(lambda frame: frame["boxes"][0].update({"class": "bus"})), "track car 1 has the categories vehicle."),
        (first(lambda frame: frame["boxes"].append(frame["boxes"][0])), "track car 1 has two boxes in one frame"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_kept(folder, capsys, change, sentence):
    edit(folder, change)
    capsys.readouterr()
    assert convert(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}") and error.count("\n") == 1 and sentence in error, error
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_truncated_cloud_and_folders_that_exist(folder, capsys):
    (folder / "clouds" / "0.bin").write_bytes(bytes(20))
    assert convert(folder) == 2
    assert "0.bin holds 5 float32 numbers, expected rows of 4" in capsys.readouterr().err
    assert main(["--example", str(folder)]) == 2
    assert f"{folder} exists already" in capsys.readouterr().err
    assert main([str(folder), str(folder.parent)]) == 2
    assert f"{folder.parent} exists already" in capsys.readouterr().err
    assert main([str(folder / "nowhere"), str(folder.parent / "own")]) == 2
    assert "nowhere/frames.json does not exist; --example " in capsys.readouterr().err
