"""nuScenes tables -> frames of the index.

Frames: global (nuScenes map), ego (vehicle at a time stamp), LiDAR (x right, y forward, z up) and camera. Matrices are
named a2b: p_b = a2b @ [p_a, 1].
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.index import CameraRecord, Frame, FrameIndex, SweepRecord, open_index
from cmt_aqr.data.sample import DataError
from cmt_aqr.nuscenes_tables import (
    LIDAR_CHANNEL,
    SPLITS_FILE,
    CheckedNuScenes,
    Tables,
    read_splits,
    read_table,
    read_velocities,
)
from cmt_aqr.progress import counted
from cmt_aqr.rotations import rotation_matrix
from cmt_aqr.table_schema import SCHEMA, TableError

# Previous sweeps kept per key frame: what the original's converter keeps, so its loader never had to choose among more.
MAX_SWEEPS = 10
# Tables that the contents of a frame depend on; the devkit reads more, but the index does not use them.
_TABLES = (
    "calibrated_sensor", "category", "ego_pose", "instance", "sample", "sample_annotation", "sample_data", "scene",
    "sensor",
)  # fmt: skip
# Seconds; an older sweep is of another recording.
_MAX_LAG = 60.0
# Version and split become parts of file names.
_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*")
# Boxes become float32 later, so a tenth of a micrometre (and microradian) keeps the index small and loses nothing.
_BOX_DECIMALS = 7


def load_index(
    *,
    dataroot: str | Path,
    version: str,
    split: str,
    cache_dir: str | Path,
    cameras: Sequence[str] = CAMERAS,
    velocity_file: str | Path | None = None,
    tables: Tables | None = None,
) -> FrameIndex:
    """Open the index of one split, building it from the tables where there is none or the tables changed.

    Args:
        dataroot: folder with `version`, samples, sweeps and maps.
        version: such as v1.0-trainval.
        split: a devkit split (train, val, mini_train ...) or one of `version`/splits.json.
        cache_dir: where index files are kept.
        cameras: channels, the order of the views.
        velocity_file: JSON, annotation token -> {"velocity_global_xy": [vx, vy] or null} in m/s; replaces the devkit's
            estimate for all annotations it lists.
        tables: those of `version`, loaded only where the index must be built; to build several indices, or to evaluate,
            without loading them again.

    Returns:
        The index.

    Raises:
        DataError: missing folder, table or split; a split without frames; broken calibration, box or reference.
    """
    root = Path(dataroot)
    for key, value in (("version", version), ("split", split)):
        if not _NAME.fullmatch(value):
            raise DataError(f"{key} is {value!r}, expected a name of the characters 0-9 A-Z a-z _ . -")
    files = _table_files(root, version)
    if velocity_file is not None:
        files["velocity_file"] = Path(velocity_file)
        if not files["velocity_file"].is_file():
            raise DataError(f"velocity_file {velocity_file} does not exist")
    settings = {
        "dataroot": str(root.resolve()),
        "version": version,
        "split": split,
        "cameras": list(cameras),
        "max_sweeps": MAX_SWEEPS,
        "velocity_file": velocity_file is not None,
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return open_index(
        Path(cache_dir) / f"index-{version}-{split}-{digest}.frames",
        dataroot=root,
        settings=settings,
        tables=files,
        build=lambda: _build_frames(tables or Tables(root, version), split, cameras, velocity_file),
    )


def check_split(dataroot: str | Path, version: str, split: str) -> None:
    """Check that a split has scenes; reads only the tables that this needs.

    Raises:
        DataError: missing folder or table; an unknown split, or one without scenes in this version.
    """
    _table_files(Path(dataroot), version)
    _scenes_of_split(Path(dataroot) / version, split)


def _table_files(root: Path, version: str) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"dataroot {root} does not exist or is no folder")
    folder = root / version
    if not folder.is_dir():
        found = sorted(path.parent.name for path in root.glob("*/sample.json"))
        raise DataError(f"dataroot {root} has no version {version!r}; it has {', '.join(found) or 'none'}")
    for file in (folder / f"{name}.json" for name in SCHEMA):
        if not file.is_file():
            raise DataError(f"table {file} is {'no regular file' if file.exists() else 'missing'}")
    files = {name: folder / f"{name}.json" for name in _TABLES}
    if (folder / SPLITS_FILE).is_file():
        files["splits"] = folder / SPLITS_FILE
    return files


def _build_frames(
    loaded: Tables, split: str, cameras: Sequence[str], velocity_file: str | Path | None
) -> Iterator[Frame]:
    folder = Path(loaded.dataroot) / loaded.version
    try:
        scenes = _scenes_of_split(folder, split)
        velocities = None if velocity_file is None else read_velocities(Path(velocity_file))
        nusc = loaded.nusc
    except TableError as error:
        raise DataError(str(error)) from None
    _check_sensors(folder / "sensor.json", nusc.sensor, cameras)
    tables = _Tables(nusc, folder, cameras, velocities)
    samples = [sample for sample in nusc.sample if nusc.get("scene", sample["scene_token"])["name"] in scenes]
    if not samples:
        raise DataError(f"split {split!r} has scenes but no sample in {folder / 'sample.json'}, expected at least one")
    for sample in counted(samples, f"index of {split}", total=len(samples), unit="frame"):
        yield tables.frame(sample)


def _check_sensors(file: Path, sensors: Sequence[dict], cameras: Sequence[str]) -> None:
    channels = {row["channel"] for row in sensors}
    for channel, modality in ((LIDAR_CHANNEL, "lidar"), *((camera, "camera") for camera in cameras)):
        if channel not in channels:
            raise DataError(f"{file} has no channel {channel!r}; it has {', '.join(sorted(channels))}")
        for row in sensors:
            if row["channel"] == channel and row["modality"] != modality:
                raise DataError(
                    f"{file}: {row['token']}, {channel}, has modality {row['modality']!r}, expected {modality!r}"
                )


def _scenes_of_split(folder: Path, split: str) -> set[str]:
    """Scene names of the split that exist in this version; at least one."""
    splits = read_splits(folder)
    file = folder / "scene.json"
    present = {row["name"] for row in read_table(file)}
    available = ", ".join(sorted(name for name, scenes in splits.items() if present & set(scenes))) or "none"
    if split not in splits:
        raise DataError(f"split {split!r} is not known in {file.parent}; splits with frames there: {available}")
    if not present & set(splits[split]):
        raise DataError(f"split {split!r} has no frame in {file}; splits with frames there: {available}")
    return present & set(splits[split])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a rigid (4, 4) transform."""
    result = np.eye(4)
    result[:3, :3] = matrix[:3, :3].T
    result[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return result


def original_yaw(rotation: np.ndarray) -> np.ndarray:
    """Yaw that the original's converter takes from full rotations (..., 3, 3): `pyquaternion.yaw_pitch_roll[0]`.

    The LiDAR leans by about two degrees, so a box that is upright on the map is not upright in the LiDAR frame and
    "yaw" is a choice. This one is the angle of the first row of R (negated), not that of the heading R[:, 0]; the two
    differ by up to 1e-3 rad.
    """
    return np.arctan2(-rotation[..., 0, 1], rotation[..., 0, 0])


class _Tables:
    """The devkit's tables with checked poses; makes frames."""

    def __init__(self, nusc: CheckedNuScenes, folder: Path, cameras: Sequence[str], velocities: Mapping | None):
        self.nusc = nusc
        self.folder = folder
        self.cameras = cameras
        self.velocities = velocities
        self._calibrations: dict[str, np.ndarray] = {}
        self._stand_ins: dict[tuple[str, str], tuple[dict, dict | None]] = {}

    def frame(self, sample: dict) -> Frame:
        """Everything about one key frame."""
        get = self.nusc.get
        lidar = get("sample_data", sample["data"][LIDAR_CHANNEL])
        lidar2ego, (ego2global,) = self._sensor2ego(lidar["calibrated_sensor_token"]), self._ego2global([lidar])
        lidar2global = ego2global @ lidar2ego
        global2lidar = _inverse(lidar2global)
        annotations = []
        for token in sample["anns"]:
            row = get("sample_annotation", token)
            name = category_to_detection_name(row["category_name"])
            if name is not None:
                annotations.append((CLASSES.index(name), row))
        return Frame(
            token=sample["token"],
            scene=get("scene", sample["scene_token"])["name"],
            timestamp=sample["timestamp"],
            lidar_file=lidar["filename"],
            lidar2ego=lidar2ego.tolist(),
            ego2global=ego2global.tolist(),
            sweeps=self._sweeps(lidar, global2lidar),
            cameras=self._cameras(sample, lidar2global, ego2global),
            boxes=self._boxes([row for _, row in annotations], global2lidar),
            labels=[label for label, _ in annotations],
            num_lidar_points=[row["num_lidar_pts"] for _, row in annotations],
            num_radar_points=[row["num_radar_pts"] for _, row in annotations],
            annotations=[row["token"] for _, row in annotations],
        )

    def _sweeps(self, key: dict, global2lidar: np.ndarray) -> list[SweepRecord]:
        rows, lags, row = [], [], key
        while row["prev"] and len(rows) < MAX_SWEEPS:
            later, row = row, self.nusc.get("sample_data", row["prev"])
            where = f"{self.folder / 'sample_data.json'}: {later['token']} has prev {row['token']}"
            if row["channel"] != LIDAR_CHANNEL:
                raise DataError(f"{where} of channel {row['channel']}, expected {LIDAR_CHANNEL}")
            lag = (key["timestamp"] - row["timestamp"]) * 1e-6
            if not (row["timestamp"] < later["timestamp"] and lag <= _MAX_LAG):
                raise DataError(
                    f"{where} with timestamp {row['timestamp']}, expected a time before its own "
                    f"{later['timestamp']} and at most {_MAX_LAG:g} s before the key frame's {key['timestamp']}"
                )
            rows.append(row)
            lags.append(lag)
        sweep2ego = np.array([self._sensor2ego(row["calibrated_sensor_token"]) for row in rows]).reshape(-1, 4, 4)
        sweep2key = (global2lidar @ (self._ego2global(rows) @ sweep2ego)).tolist()
        return [SweepRecord(row["filename"], *values) for row, *values in zip(rows, lags, sweep2key, strict=True)]

    def _cameras(self, sample: dict, lidar2global: np.ndarray, ego2global: np.ndarray) -> list[CameraRecord]:
        found = {
            name: self.nusc.get("sample_data", sample["data"][name]) for name in self.cameras if name in sample["data"]
        }
        poses = dict(zip(found, self._ego2global(found.values()), strict=True))
        cameras = []
        for channel in self.cameras:
            if channel in found:
                row = found[channel]
                calibration = self.nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
            else:
                calibration, row = self._stand_in(channel, sample)
            ego2cam = _inverse(self._sensor2ego(calibration["token"]))
            global2ego = _inverse(poses.get(channel, ego2global))
            lidar2cam = (ego2cam @ global2ego @ lidar2global).tolist()
            file = row["filename"] if channel in found else None
            intrinsic = calibration["camera_intrinsic"]
            cameras.append(CameraRecord(channel, file, row["height"], row["width"], intrinsic, lidar2cam))
        return cameras

    def _stand_in(self, channel: str, sample: dict) -> tuple[dict, dict]:
        """Calibration and size for a view without image: of the same scene, else any calibration of the sensor."""
        key = (channel, sample["scene_token"])
        if key not in self._stand_ins:
            self._stand_ins[key] = self._find_stand_in(channel, sample)
        return self._stand_ins[key]

    def _find_stand_in(self, channel: str, sample: dict) -> tuple[dict, dict]:
        rows = (
            self.nusc.get("sample_data", other["data"][channel])
            for other in sorted(self.nusc.sample, key=lambda s: s["scene_token"] != sample["scene_token"])
            if channel in other["data"]
        )
        row = next(rows, None)
        if row is not None:
            return self.nusc.get("calibrated_sensor", row["calibrated_sensor_token"]), row
        of_sensor = (
            calibration
            for calibration in self.nusc.calibrated_sensor
            if self.nusc.get("sensor", calibration["sensor_token"])["channel"] == channel
        )
        calibration = next(of_sensor, None)
        images = (r for r in self.nusc.sample_data if r["is_key_frame"] and r["sensor_modality"] == "camera")
        size = next(images, None)
        if calibration is None or size is None:
            raise DataError(
                f"{self.folder / 'calibrated_sensor.json'}: sample {sample['token']} has no {channel} image and no "
                f"calibration of {channel} exists to stand in"
            )
        return calibration, size

    @staticmethod
    def _poses(rows: Sequence[dict]) -> np.ndarray:
        """(N, 4, 4) float64."""
        if not rows:
            return np.empty((0, 4, 4))
        matrices = np.zeros((len(rows), 4, 4))
        matrices[:, :3, :3] = rotation_matrix([row["rotation"] for row in rows])
        matrices[:, :3, 3] = [row["translation"] for row in rows]
        matrices[:, 3, 3] = 1
        return matrices

    def _ego2global(self, recordings: Iterable[dict]) -> np.ndarray:
        """(N, 4, 4)."""
        return self._poses([self.nusc.get("ego_pose", row["ego_pose_token"]) for row in recordings])

    def _sensor2ego(self, token: str) -> np.ndarray:
        if token not in self._calibrations:
            (self._calibrations[token],) = self._poses([self.nusc.get("calibrated_sensor", token)])
        return self._calibrations[token]

    def _boxes(self, rows: Sequence[dict], global2lidar: np.ndarray) -> list[list[float | None]]:
        """Boxes (9) in the LiDAR frame; *Source*: mmdet3d `nuscenes_converter` with gravity centres."""
        if not rows:
            return []
        turn, shift = global2lidar[:3, :3], global2lidar[:3, 3]
        centres = np.array([row["translation"] for row in rows]) @ turn.T + shift
        sizes = np.array([row["size"] for row in rows])[:, [1, 0, 2]]  # nuScenes has the width first
        yaws = original_yaw(turn @ rotation_matrix([row["rotation"] for row in rows]))
        velocities = np.array([self._velocity(row["token"]) for row in rows]) @ turn[:2, :2].T
        boxes = np.column_stack((centres, sizes, yaws, velocities)).round(_BOX_DECIMALS).tolist()
        is_known = np.isfinite(velocities).all(axis=1)
        return [box if known else [*box[:7], None, None] for box, known in zip(boxes, is_known, strict=True)]

    def _velocity(self, token: str) -> Sequence[float]:
        """Global vx, vy in m/s, NaN where unknown."""
        if self.velocities is not None and token in self.velocities:
            return self.velocities[token] or (np.nan, np.nan)
        return self.nusc.box_velocity(token)[:2]
