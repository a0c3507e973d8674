"""A tiny nuScenes-format dataset with known answers: a turning vehicle, a static wall, one moving car."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from cmt_aqr.classes import CAMERAS

VERSION = "v1.0-tiny"
IMAGE_SIZE = (36, 64)
KEY_INTERVAL = 0.5
SWEEP_INTERVAL = 0.05
CAR_VELOCITY = (3.0, -1.0)
CAR_SIZE_WLH = (2.0, 4.0, 1.6)
_INTRINSIC = [[40.0, 0.0, 32.0], [0.0, 40.0, 18.0], [0.0, 0.0, 1.0]]
_CAMERA_YAWS = dict(zip(CAMERAS, (0.0, -55.0, 55.0, 180.0, 110.0, -110.0), strict=True))


@dataclass(frozen=True)
class World:
    root: Path
    wall: np.ndarray  # (N, 3) global, static

    def table(self, name: str) -> Path:
        return self.root / VERSION / f"{name}.json"

    def edit(self, name: str, change: Callable[[list], object]) -> None:
        rows = json.loads(self.table(name).read_text())
        change(rows)
        self.table(name).write_text(json.dumps(rows))


def _quaternion(axis, angle: float) -> np.ndarray:
    return np.concatenate(([math.cos(angle / 2)], math.sin(angle / 2) * np.asarray(axis, dtype=float)))


def _product(a, b) -> np.ndarray:
    w, v, x, u = a[0], a[1:], b[0], b[1:]
    return np.concatenate(([w * x - v @ u], w * u + x * v + np.cross(v, u)))


def _rotate(q, points) -> np.ndarray:
    v, w = q[1:], q[0]
    return points + 2 * np.cross(v, np.cross(v, points) + w * points)


def _inverse_rotate(q, points) -> np.ndarray:
    return _rotate(q * [1, -1, -1, -1], points)


def category_token(name: str) -> str:
    return "category-" + name.replace(".", "-")


def view_colour(camera: str) -> tuple[int, int, int]:
    """RGB of the one-coloured image of a camera."""
    return (30 + 30 * CAMERAS.index(camera), 100, 200)


def ego_pose(time: float) -> tuple[np.ndarray, np.ndarray]:
    """Translation and quaternion of the vehicle: it drives and turns."""
    return np.array([400 + 6 * time, 900 + 2 * time, 0.0]), _quaternion([0, 0, 1], 0.3 + 0.4 * time)


LIDAR_MOUNT = (np.array([0.9, 0.0, 1.8]), _product(_quaternion([0, 0, 1], -math.pi / 2), _quaternion([1, 0, 0], 0.03)))
_FORWARD = np.array([0.5, -0.5, 0.5, -0.5])  # camera axes (z forward) in the ego frame


def car_position(time: float) -> np.ndarray:
    return np.array([412 + CAR_VELOCITY[0] * time, 903 + CAR_VELOCITY[1] * time, 0.8])


def to_lidar(points: np.ndarray, time: float) -> np.ndarray:
    (te, qe), (tl, ql) = ego_pose(time), LIDAR_MOUNT
    return _inverse_rotate(ql, _inverse_rotate(qe, points - te) - tl)


def write_world(
    root: Path, *, scenes: dict[str, int] | None = None, splits: dict[str, list[str]] | None = None
) -> World:
    """Write the dataset.

    Args:
        scenes: scene name -> number of key frames.
        splits: custom splits; default: one split `all`.
    """
    scenes = scenes or {"scene-a": 3}
    rng = np.random.default_rng(0)
    wall = np.stack((rng.uniform(395, 425, 300), np.full(300, 915.0), rng.uniform(0, 3, 300)), axis=1)
    t = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "sample_annotation", "instance")}
    t["sensor"] = [{"token": f"sensor-{c}", "channel": c, "modality": "camera"} for c in CAMERAS]
    t["sensor"].append({"token": "sensor-LIDAR_TOP", "channel": "LIDAR_TOP", "modality": "lidar"})
    t["calibrated_sensor"] = [_calibration(c) for c in (*CAMERAS, "LIDAR_TOP")]
    names = ("vehicle.car", "human.pedestrian.adult", "movable_object.pushable_pullable")
    t["category"] = [{"token": category_token(n), "name": n, "description": ""} for n in names]
    t["attribute"], t["visibility"] = [], []
    t["log"] = [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": ""}]
    t["map"] = [{"token": "map", "log_tokens": ["log"], "category": "", "filename": "maps/blank.png"}]
    (root / "maps").mkdir(parents=True)
    (root / "maps" / "blank.png").write_bytes(b"")
    for folder in ("LIDAR_TOP", *CAMERAS):
        (root / "samples" / folder).mkdir(parents=True)
        (root / "sweeps" / folder).mkdir(parents=True)
    for scene, count in scenes.items():
        _write_scene(root, t, scene, count, wall)
    (root / VERSION).mkdir()
    for name, rows in t.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(rows))
    splits = {"all": list(scenes)} if splits is None else splits
    (root / VERSION / "splits.json").write_text(json.dumps(splits))
    return World(root, wall)


def _calibration(channel: str) -> dict:
    if channel == "LIDAR_TOP":
        translation, rotation, intrinsic = *LIDAR_MOUNT, []
    else:
        yaw = _quaternion([0, 0, 1], math.radians(_CAMERA_YAWS[channel]))
        translation, rotation, intrinsic = np.array([1.0, 0.0, 1.5]), _product(yaw, _FORWARD), _INTRINSIC
    return {
        "token": f"calibration-{channel}",
        "sensor_token": f"sensor-{channel}",
        "translation": translation.tolist(),
        "rotation": rotation.tolist(),
        "camera_intrinsic": intrinsic,
    }


def _write_scene(root: Path, t: dict[str, list], scene: str, count: int, wall: np.ndarray) -> None:
    sample = [f"{scene}-sample-{k}" for k in range(count)]
    ends = {"first_sample_token": sample[0], "last_sample_token": sample[-1]}
    t["scene"].append(
        {"token": scene, "name": scene, "log_token": "log", "nbr_samples": count, **ends, "description": ""}
    )
    for k, token in enumerate(sample):
        neighbours = {"prev": sample[k - 1] if k else "", "next": sample[k + 1] if k + 1 < count else ""}
        time = k * KEY_INTERVAL
        t["sample"].append({"token": token, "timestamp": _stamp(time), "scene_token": scene, **neighbours})
        for camera in CAMERAS:
            file = f"samples/{camera}/{token}.jpg"
            image = np.empty((*IMAGE_SIZE, 3), dtype=np.uint8)
            image[:] = view_colour(camera)[::-1]  # OpenCV writes BGR
            cv2.imwrite(str(root / file), image)
            _sample_data(t, f"{token}-{camera}", token, camera, file, time + 0.01, True)
    steps = round(KEY_INTERVAL / SWEEP_INTERVAL)
    previous = None
    for step in range((count - 1) * steps + 1):
        time, k = step * SWEEP_INTERVAL, -(-step // steps)
        key = step % steps == 0
        file = f"{'samples' if key else 'sweeps'}/LIDAR_TOP/{scene}-{step}.bin"
        own_vehicle = to_lidar(np.zeros((0, 3)), time)
        car = car_position(time) + np.random.default_rng(1).uniform(-0.7, 0.7, (30, 3))
        xyz = np.concatenate((to_lidar(wall, time), to_lidar(car, time), own_vehicle, [[0.5, -0.5, 0.1]]))
        points = np.concatenate((xyz, np.full((len(xyz), 1), 7.0), np.full((len(xyz), 1), 31.0)), axis=1)
        points.astype(np.float32).tofile(root / file)
        row = _sample_data(t, f"{scene}-lidar-{step}", sample[k], "LIDAR_TOP", file, time, key)
        if previous is not None:
            row["prev"], previous["next"] = previous["token"], row["token"]
        previous = row
    _annotations(t, scene, sample)


def _stamp(time: float) -> int:
    return 1_600_000_000_000_000 + round(time * 1e6)


def _sample_data(t, token: str, sample: str, channel: str, file: str, time: float, key: bool) -> dict:
    translation, rotation = ego_pose(time)
    pose = {
        "token": token,
        "timestamp": _stamp(time),
        "rotation": rotation.tolist(),
        "translation": translation.tolist(),
    }
    t["ego_pose"].append(pose)
    camera = channel != "LIDAR_TOP"
    row = {
        "token": token,
        "sample_token": sample,
        "ego_pose_token": token,
        "calibrated_sensor_token": f"calibration-{channel}",
        "timestamp": _stamp(time),
        "fileformat": "jpg" if camera else "pcd",
        "is_key_frame": key,
        "height": IMAGE_SIZE[0] if camera else 0,
        "width": IMAGE_SIZE[1] if camera else 0,
        "filename": file,
        "prev": "",
        "next": "",
    }
    t["sample_data"].append(row)
    return row


def _annotations(t, scene: str, sample: list[str]) -> None:
    objects = (
        ("car", "vehicle.car", CAR_SIZE_WLH, 25),
        ("walker", "human.pedestrian.adult", (0.6, 0.7, 1.8), 0),
        ("trolley", "movable_object.pushable_pullable", (0.6, 0.6, 1.0), 9),
    )
    for name, category, size, num_points in objects:
        tokens = [f"{token}-{name}" for token in sample]
        ends = {
            "first_annotation_token": tokens[0],
            "last_annotation_token": tokens[-1],
            "nbr_annotations": len(tokens),
        }
        t["instance"].append({"token": f"{scene}-{name}", "category_token": category_token(category), **ends})
        for k, token in enumerate(tokens):
            position = (
                car_position(k * KEY_INTERVAL) if name == "car" else np.array([405.0, 908.0 + (name == "car"), 0.9])
            )
            heading = math.atan2(CAR_VELOCITY[1], CAR_VELOCITY[0])
            row = {"token": token, "sample_token": sample[k], "instance_token": f"{scene}-{name}"}
            row |= {
                "visibility_token": "",
                "attribute_tokens": [],
                "translation": position.tolist(),
                "size": list(size),
            }
            row |= {
                "rotation": _quaternion([0, 0, 1], heading).tolist(),
                "num_lidar_pts": num_points,
                "num_radar_pts": 0,
            }
            row |= {"prev": tokens[k - 1] if k else "", "next": tokens[k + 1] if k + 1 < len(tokens) else ""}
            t["sample_annotation"].append(row)
