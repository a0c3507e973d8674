"""Turn a folder of your own recordings (images, clouds, one JSON) into a data set in nuScenes' format.

    python -m cmt_aqr.tools.from_folder --example my_data      # writes three small frames as an example
    python -m cmt_aqr.tools.from_folder my_data data/own
    python train.py CONFIG --set data.root=data/own data.version=v1.0-own data.train_split=own_train ...

frames.json in the folder holds

    cameras  channel (CAM_FRONT ... CAM_BACK_RIGHT, all six) -> intrinsic (3 x 3), lidar2cam (4 x 4)
    frames   a list, in any order, of: scene (a name), split (a name, the same in a whole scene), time (seconds),
             points (file), images (channel -> file; without an entry the view is missing),
             ego2global (4 x 4, optional: pose of the LiDAR; without it velocities are relative to the vehicle),
             boxes (a list of: class, center [x, y, z], size [length, width, height], yaw, track (a name, optional))

Points are float32 rows x, y, z, intensity (0 to 255), in metres, x to the right, y forward, z up; boxes are in the
same frame, yaw counter-clockwise from x. Boxes of one track in one scene are one object, whose velocity follows.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.from_folder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="FOLDER", help="folder with frames.json")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--version", default="v1.0-own", help="name of the tables' folder (default: %(default)s)")
    parser.add_argument("--example", action="store_true", help="write an example of such a FOLDER instead")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from pyquaternion import Quaternion

from cmt_aqr.boxes import points_in_boxes
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.errors import report_errors
from cmt_aqr.files import atomic_path, write_bytes
from cmt_aqr.progress import counted
from cmt_aqr.synthetic.calibration import LIDAR_CHANNEL, yaw_quaternion
from cmt_aqr.synthetic.objects import CATEGORIES
from cmt_aqr.synthetic.tables import LOG_NAME, MAP_FILE, TABLES, blank_map, fixed_tables, token, write_table
from cmt_aqr.tools.from_folder_example import FRAMES_FILE, POINT_COLUMNS, FolderError, write_example
from cmt_aqr.yaml_reader import suggest

# Columns of nuScenes' files: the last one is the ring index.
FILE_COLUMNS = 5
# Sensors of the synthetic world's calibration, which is replaced.
ANY_SIZE = (1600, 900)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        if options.example:
            write_example(options.source)
            print(f"{options.source}: three frames of a car, for from_folder {options.source} OUT")
            return 0
        if options.out is None:
            raise FolderError("OUT is missing: name the folder to write")
        if options.out.exists():
            raise FolderError(f"{options.out} exists already: name another folder, or remove it")
        counts = convert(options.source, options.out, options.version)
        scenes, frames, boxes = (counts[name] for name in ("scene", "sample", "sample_annotation"))
        print(f"{options.out}: {scenes} scenes, {frames} frames, {boxes} boxes")
        return 0

    return report_errors(run)


def convert(source: Path, out: Path, version: str) -> dict[str, int]:
    """Write the data set; returns the number of rows of each table.

    Raises:
        FolderError: one sentence on what is wrong in the folder; nothing is written then.
    """
    content = _read(source)
    cameras = _get(content, "cameras", source / FRAMES_FILE, dict)
    frames = _get(content, "frames", source / FRAMES_FILE, list)
    if not frames:
        raise FolderError(f"{source / FRAMES_FILE}: frames is empty, expected at least one frame")
    with atomic_path(out) as partial:
        writer = _Writer(source, partial, cameras)
        for number, frame in enumerate(counted(frames, "frames", total=len(frames), unit="frame")):
            writer.add(number, frame)
        return writer.write_tables(version)


class _Writer:
    """Copies sensor files and gathers the rows of the tables."""

    def __init__(self, source: Path, root: Path, cameras: dict):
        self.file = source / FRAMES_FILE
        self.source, self.root = source, root
        self.rows: dict[str, list[dict]] = {name: [] for name in TABLES} | fixed_tables(ANY_SIZE)
        self.rows["calibrated_sensor"] = [self._calibration(LIDAR_CHANNEL, np.eye(4), [])]
        for channel in CAMERAS:
            where = f"{self.file}: cameras: {channel}"
            camera = _get(cameras, channel, f"{self.file}: cameras", dict)
            intrinsic = _matrix(camera, "intrinsic", where, 3)
            self.rows["calibrated_sensor"].append(
                self._calibration(channel, np.linalg.inv(_pose(camera, "lidar2cam", where)), intrinsic.tolist())
            )
        self.splits: dict[str, list[str]] = defaultdict(list)
        self.scenes: dict[str, list[dict]] = defaultdict(list)
        self.tracks: dict[tuple[str, str], list[tuple[int, dict]]] = defaultdict(list)
        for folder in (LIDAR_CHANNEL, *CAMERAS):
            (root / "samples" / folder).mkdir(parents=True)

    def add(self, number: int, frame: Any) -> None:
        """Add one frame: its files, its rows, its boxes."""
        where = f"{self.file}: frame {number}"
        if not isinstance(frame, dict):
            raise FolderError(f"{where} is {frame!r}, expected an object")
        scene, split = (_get(frame, key, where, str) for key in ("scene", "split"))
        if scene not in self.splits[split]:
            if any(scene in names for names in self.splits.values()):
                raise FolderError(f"{where}: split is {split!r}, other frames of scene {scene!r} are in another split")
            self.splits[split].append(scene)
        time = round(1e6 * _number(frame, "time", where))
        sample = {
            "token": token("own sample", scene, time),
            "timestamp": time,
            "scene_token": token("own scene", scene),
        }
        if any(row["token"] == sample["token"] for row in self.scenes[scene]):
            raise FolderError(f"{where}: time {frame['time']} is that of another frame of scene {scene!r}")
        self.scenes[scene].append(sample)
        pose = _pose(frame, "ego2global", where) if "ego2global" in frame else np.eye(4)
        self.rows["ego_pose"].append({"token": sample["token"], "timestamp": time, **_placed(pose)})
        points = self._points(_get(frame, "points", where, str), where)
        name = f"samples/{LIDAR_CHANNEL}/{sample['token']}.pcd.bin"
        rings = np.zeros((len(points), FILE_COLUMNS - POINT_COLUMNS), np.float32)
        write_bytes(self.root / name, np.hstack((points, rings)).tobytes())
        self._add_recording(LIDAR_CHANNEL, sample, name, (0, 0))
        for channel, file in _get(frame, "images", where, dict).items():
            self._add_image(channel, file, sample, where)
        for i, box in enumerate(_get(frame, "boxes", where, list)):
            self._add_box(f"{where}: box {i}", box, (scene, f"untracked {number} {i}"), sample, points, pose)

    def _points(self, file: str, where: str) -> np.ndarray:
        path = self.source / file
        if not path.is_file():
            raise FolderError(f"{where}: points: {path} does not exist")
        data = np.fromfile(path, dtype=np.float32)
        if len(data) == 0 or len(data) % POINT_COLUMNS:
            raise FolderError(f"{path} holds {len(data)} float32 numbers, expected rows of {POINT_COLUMNS}")
        return data.reshape(-1, POINT_COLUMNS)

    def _add_image(self, channel: str, file: str, sample: dict, where: str) -> None:
        if channel not in CAMERAS:
            raise FolderError(f"{where}: images has {channel!r}, expected one of {', '.join(CAMERAS)}")
        image = cv2.imread(str(self.source / file))
        if image is None:
            raise FolderError(f"{where}: images: {self.source / file} does not exist or is no image")
        name = f"samples/{channel}/{sample['token']}.jpg"
        if Path(file).suffix.lower() in (".jpg", ".jpeg"):
            write_bytes(self.root / name, (self.source / file).read_bytes())
        else:
            write_bytes(self.root / name, cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
        self._add_recording(channel, sample, name, image.shape[:2])

    def _add_recording(self, channel: str, sample: dict, name: str, size: tuple[int, int]) -> None:
        self.rows["sample_data"].append(
            {
                "token": token("own data", channel, sample["token"]),
                "sample_token": sample["token"],
                "ego_pose_token": sample["token"],
                "calibrated_sensor_token": token("own calibration", channel),
                "timestamp": sample["timestamp"],
                "fileformat": "pcd" if channel == LIDAR_CHANNEL else "jpg",
                "is_key_frame": True,
                "height": size[0],
                "width": size[1],
                "filename": name,
                "prev": "",
                "next": "",
            }
        )

    def _add_box(
        self, where: str, box: Any, key: tuple[str, str], sample: dict, points: np.ndarray, pose: np.ndarray
    ) -> None:
        if not isinstance(box, dict):
            raise FolderError(f"{where} is {box!r}, expected an object")
        label = _get(box, "class", where, str)
        if label not in CLASSES:
            meant = suggest(label, CLASSES)
            raise FolderError(f"{where}: class is {label!r}, expected one of {', '.join(CLASSES)}{meant}")
        center, size = (_array(box, name, where, (3,)) for name in ("center", "size"))
        if size.min() <= 0:
            raise FolderError(f"{where}: size is {box['size']}, expected length, width and height above 0")
        yaw = _number(box, "yaw", where)
        turned = pose @ _transform(yaw, center)
        values = torch.tensor([[*center, *size, yaw, 0, 0]], dtype=torch.float32)
        row = {
            "sample_token": sample["token"],
            "visibility_token": "4",
            "attribute_tokens": [],
            "size": [float(size[1]), float(size[0]), float(size[2])],  # nuScenes: width, length, height
            "num_lidar_pts": int(points_in_boxes(torch.from_numpy(points), values).sum()),
            "num_radar_pts": 0,
            "category": CATEGORIES[label],
            **_placed(turned),
        }
        track = (key[0], f"track {box['track']}") if "track" in box else key
        self.tracks[track].append((sample["timestamp"], row))

    def _calibration(self, channel: str, sensor2ego: np.ndarray, intrinsic: list) -> dict:
        names = {"token": token("own calibration", channel), "sensor_token": token("sensor", channel)}
        return names | _placed(sensor2ego) | {"camera_intrinsic": intrinsic}

    def write_tables(self, version: str) -> dict[str, int]:
        """All tables, the splits and the blank map; returns the number of rows of each table."""
        for name, samples in self.scenes.items():
            samples.sort(key=lambda row: row["timestamp"])
            self.rows["sample"] += _chained(samples)
            self.rows["scene"].append(
                {
                    "token": token("own scene", name),
                    "log_token": token("log", LOG_NAME),
                    "nbr_samples": len(samples),
                    "first_sample_token": samples[0]["token"],
                    "last_sample_token": samples[-1]["token"],
                    "name": name,
                    "description": "",
                }
            )
        for key, seen in self.tracks.items():
            self._add_track(key, [row for _, row in sorted(seen, key=lambda pair: pair[0])])
        folder = self.root / version
        folder.mkdir()
        (self.root / "maps").mkdir()
        for name in TABLES:
            write_table(folder / f"{name}.json", self.rows[name])
        write_bytes(folder / "splits.json", json.dumps(self.splits, indent=1).encode())
        write_bytes(self.root / MAP_FILE, cv2.imencode(".png", blank_map())[1].tobytes())
        return {name: len(self.rows[name]) for name in TABLES}

    def _add_track(self, key: tuple[str, str], rows: list[dict]) -> None:
        categories = {row.pop("category") for row in rows}
        where = f"{self.file}: scene {key[0]!r}: {key[1]}"
        if len(categories) > 1:
            raise FolderError(f"{where} has the categories {', '.join(sorted(categories))}, expected one")
        if len({row["sample_token"] for row in rows}) < len(rows):
            raise FolderError(f"{where} has two boxes in one frame, expected one")
        instance = token("own instance", *key)
        for row in rows:
            row |= {"token": token("own box", instance, row["sample_token"]), "instance_token": instance}
        self.rows["sample_annotation"] += _chained(rows)
        self.rows["instance"].append(
            {
                "token": instance,
                "nbr_annotations": len(rows),
                "category_token": token("category", categories.pop()),
                "first_annotation_token": rows[0]["token"],
                "last_annotation_token": rows[-1]["token"],
            }
        )


def _chained(rows: list[dict]) -> list[dict]:
    """The rows, each with the tokens of the one before and the one after it."""
    for row in rows:
        row |= {"prev": "", "next": ""}
    for earlier, later in pairwise(rows):
        earlier["next"], later["prev"] = later["token"], earlier["token"]
    return rows


def _read(source: Path) -> dict:
    path = source / FRAMES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist; --example {source} writes one to start from") from None
    except ValueError as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds a {type(content).__name__}, expected an object with cameras and frames")
    return content


def _get(holder: dict, key: str, where: object, kind: type) -> Any:
    names = {dict: "an object", list: "a list", str: "a text"}
    if key not in holder:
        raise FolderError(f"{where}: {key} is missing, expected {names[kind]}")
    if not isinstance(holder[key], kind):
        raise FolderError(f"{where}: {key} is {holder[key]!r}, expected {names[kind]}")
    return holder[key]


def _array(holder: dict, key: str, where: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.array(holder.get(key), dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all():
        expected = " x ".join(map(str, shape)) or "one"
        raise FolderError(f"{where}: {key} is {holder.get(key)!r}, expected finite numbers: {expected}")
    return array


def _number(holder: dict, key: str, where: str) -> float:
    return float(_array(holder, key, where, ()))


def _matrix(holder: dict, key: str, where: str, size: int) -> np.ndarray:
    matrix = _array(holder, key, where, (size, size))
    if matrix[-1].tolist() != np.eye(size)[-1].tolist() or abs(np.linalg.det(matrix)) < 1e-9:
        last = matrix[-1].tolist()
        raise FolderError(f"{where}: {key} is singular, or its last row {last} is not 0 ... 0 1")
    return matrix


def _pose(holder: dict, key: str, where: str) -> np.ndarray:
    """A rigid (4, 4) transform."""
    matrix = _matrix(holder, key, where, 4)
    rotation = matrix[:3, :3]
    if abs(rotation @ rotation.T - np.eye(3)).max() > 1e-5 or np.linalg.det(rotation) < 0:
        raise FolderError(f"{where}: {key} is no rotation and translation, expected orthogonal rows of length 1")
    return matrix


def _transform(yaw: float, center: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(yaw_quaternion(yaw)).rotation_matrix
    matrix[:3, 3] = center
    return matrix


def _placed(pose: np.ndarray) -> dict[str, list[float]]:
    """A pose as nuScenes writes it."""
    rotation = Quaternion(matrix=pose[:3, :3], rtol=1e-4, atol=1e-4)
    return {"translation": pose[:3, 3].tolist(), "rotation": rotation.elements.tolist()}


if __name__ == "__main__":
    sys.exit(main())
