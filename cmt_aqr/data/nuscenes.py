"""nuScenes tables -> frames of the index. The only module of this package that imports the devkit.

Frames: global (nuScenes map), ego (vehicle at a time stamp), LiDAR (x right, y forward, z up) and camera. Matrices are
named a2b: p_b = a2b @ [p_a, 1].
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes
from tqdm import tqdm

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.index import CameraRecord, Frame, FrameIndex, SweepRecord, open_index
from cmt_aqr.data.sample import DataError

# Previous sweeps kept per key frame: what the original's converter keeps, so its loader never had to choose among more.
MAX_SWEEPS = 10
LIDAR_CHANNEL = "LIDAR_TOP"
# Tables that decide what a frame holds; the devkit reads more, but they do not reach the index.
_TABLES = (
    "calibrated_sensor", "category", "ego_pose", "instance", "sample", "sample_annotation", "sample_data", "scene",
    "sensor",
)  # fmt: skip
_OTHER_TABLES = ("attribute", "log", "map", "visibility")
# A rotation whose quaternion is further from unit length than this was not written by a calibration.
_QUATERNION_TOLERANCE = 1e-3
_MIN_DETERMINANT = 1e-9
# Boxes end as float32; a tenth of a micrometre (and microradian) keeps the index small and loses nothing.
_BOX_DECIMALS = 7


def load_index(
    *,
    dataroot: str | Path,
    version: str,
    split: str,
    cache_dir: str | Path,
    cameras: Sequence[str] = CAMERAS,
    velocity_file: str | Path | None = None,
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

    Returns:
        The index.

    Raises:
        DataError: missing folder, table or split; a split without frames; broken calibration, box or reference.
    """
    root = Path(dataroot)
    tables = _table_files(root, version)
    if velocity_file is not None:
        tables["velocity_file"] = Path(velocity_file)
        if not tables["velocity_file"].is_file():
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
        Path(cache_dir) / f"index-{version}-{split}-{digest}.jsonl.gz",
        dataroot=root,
        settings=settings,
        tables=tables,
        build=lambda: _build_frames(root, version, split, cameras, velocity_file),
    )


def _table_files(root: Path, version: str) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"dataroot {root} does not exist or is no folder")
    folder = root / version
    if not folder.is_dir():
        found = sorted(path.parent.name for path in root.glob("*/sample.json"))
        raise DataError(f"dataroot {root} has no version {version!r}; it has {', '.join(found) or 'none'}")
    for name in (*_TABLES, *_OTHER_TABLES):
        if not (folder / f"{name}.json").is_file():
            raise DataError(f"table {folder / name}.json is missing")
    files = {name: folder / f"{name}.json" for name in _TABLES}
    if (folder / "splits.json").is_file():
        files["splits"] = folder / "splits.json"
    return files


def _read_json(path: Path) -> list | dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def _build_frames(
    root: Path, version: str, split: str, cameras: Sequence[str], velocity_file: str | Path | None
) -> Iterator[Frame]:
    folder = root / version
    scenes = _scenes_of_split(folder, split)
    channels = {row["channel"] for row in _read_json(folder / "sensor.json")}
    for channel in (LIDAR_CHANNEL, *cameras):
        if channel not in channels:
            raise DataError(
                f"{folder / 'sensor.json'} has no channel {channel!r}; it has {', '.join(sorted(channels))}"
            )
    for row in _read_json(folder / "map.json"):
        if not (root / row["filename"]).is_file():
            raise DataError(
                f"{folder / 'map.json'}: map file {root / row['filename']} does not exist (the devkit needs it)"
            )
    velocities = None if velocity_file is None else _read_velocities(Path(velocity_file))
    nusc = _open_devkit(folder)
    tables = _Tables(nusc, folder, cameras, velocities)
    samples = [sample for sample in nusc.sample if nusc.get("scene", sample["scene_token"])["name"] in scenes]
    if not samples:
        raise DataError(f"split {split!r} has scenes but no sample in {folder / 'sample.json'}, expected at least one")
    for sample in tqdm(samples, desc=f"index of {split}", unit="frame", disable=None):
        try:
            yield tables.frame(sample)
        except KeyError as error:
            raise DataError(f"{folder}: sample {sample['token']} leads to {error}, which no table holds") from None


def _open_devkit(folder: Path) -> NuScenes:
    try:
        return NuScenes(version=folder.name, dataroot=str(folder.parent), verbose=False)
    except KeyError as error:
        raise DataError(f"{folder}: a table refers to {error}, which no other table holds") from None
    except ValueError:
        for name in (*_TABLES, *_OTHER_TABLES):
            _read_json(folder / f"{name}.json")
        raise


def _read_velocities(path: Path) -> dict[str, tuple[float, float] | None]:
    """Annotation token -> global vx, vy in m/s or None."""
    try:
        entries = {token: entry["velocity_global_xy"] for token, entry in _read_json(path).items()}
        velocities = {token: None if v is None else (float(v[0]), float(v[1])) for token, v in entries.items()}
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        expected = 'annotation token -> {"velocity_global_xy": [vx, vy] or null}'
        raise DataError(f"velocity_file {path} has an entry of another form ({error!r}), expected {expected}") from None
    for token, velocity in velocities.items():
        if velocity is not None and not np.isfinite(velocity).all():
            raise DataError(f"velocity_file {path}: {token} has {velocity}, expected finite m/s or null")
    return velocities


def _scenes_of_split(folder: Path, split: str) -> set[str]:
    """Scene names of the split that exist in this version; at least one."""
    splits = dict(create_splits_scenes())
    if (folder / "splits.json").is_file():
        splits |= _read_json(folder / "splits.json")
    present = {row["name"] for row in _read_json(folder / "scene.json")}
    available = ", ".join(sorted(name for name, scenes in splits.items() if present & set(scenes))) or "none"
    if split not in splits:
        raise DataError(f"split {split!r} is not known in {folder}; splits with frames there: {available}")
    if not present & set(splits[split]):
        raise DataError(f"split {split!r} has no frame in {folder}; splits with frames there: {available}")
    return present & set(splits[split])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a rigid (4, 4) transform."""
    result = np.eye(4)
    result[:3, :3] = matrix[:3, :3].T
    result[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return result


def rotation_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Unit quaternion (w, x, y, z) -> (3, 3) float64 rotation; normalises first."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def original_yaw(rotation: np.ndarray) -> float:
    """Yaw that the original's converter takes from a full rotation (3, 3): `pyquaternion.yaw_pitch_roll[0]`.

    The LiDAR leans by about two degrees, so a box that is upright on the map is not upright in the LiDAR frame and
    "yaw" is a choice. This one is the angle of the first row of R (negated), not that of the heading R[:, 0]; the two
    differ by up to 1e-3 rad.
    """
    return float(np.arctan2(-rotation[0, 1], rotation[0, 0]))


class _Tables:
    """The devkit's tables with checked poses; makes frames."""

    def __init__(self, nusc: NuScenes, folder: Path, cameras: Sequence[str], velocities: Mapping | None):
        self.nusc = nusc
        self.folder = folder
        self.cameras = cameras
        self.velocities = velocities
        self._calibrations: dict[str, np.ndarray] = {}
        self._stand_ins: dict[tuple[str, str], tuple[dict, dict | None]] = {}

    def frame(self, sample: dict) -> Frame:
        """Everything about one key frame."""
        get = self.nusc.get
        if LIDAR_CHANNEL not in sample["data"]:
            raise DataError(
                f"{self.folder / 'sample_data.json'}: sample {sample['token']} has no {LIDAR_CHANNEL} record"
            )
        lidar = get("sample_data", sample["data"][LIDAR_CHANNEL])
        lidar2ego, ego2global = self._sensor2ego(lidar["calibrated_sensor_token"]), self._ego2global(lidar)
        lidar2global = ego2global @ lidar2ego
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
            sweeps=self._sweeps(lidar, _inverse(lidar2global)),
            cameras=[self._camera(channel, sample, lidar2global, ego2global) for channel in self.cameras],
            boxes=[self._box(row, _inverse(lidar2global)) for _, row in annotations],
            labels=[label for label, _ in annotations],
            num_lidar_points=[row["num_lidar_pts"] for _, row in annotations],
            num_radar_points=[row["num_radar_pts"] for _, row in annotations],
            annotations=[row["token"] for _, row in annotations],
        )

    def _sweeps(self, key: dict, global2lidar: np.ndarray) -> list[SweepRecord]:
        sweeps, row = [], key
        while row["prev"] and len(sweeps) < MAX_SWEEPS:
            row = self.nusc.get("sample_data", row["prev"])
            sweep2global = self._ego2global(row) @ self._sensor2ego(row["calibrated_sensor_token"])
            lag = (key["timestamp"] - row["timestamp"]) * 1e-6
            sweeps.append(SweepRecord(row["filename"], lag, (global2lidar @ sweep2global).tolist()))
        return sweeps

    def _camera(self, channel: str, sample: dict, lidar2global: np.ndarray, ego2global: np.ndarray) -> CameraRecord:
        if channel in sample["data"]:
            row = self.nusc.get("sample_data", sample["data"][channel])
            calibration = self.nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
            file, ego2global = row["filename"], self._ego2global(row)
        else:
            file, (calibration, row) = None, self._stand_in(channel, sample)
        if not (row["width"] > 0 and row["height"] > 0):
            size = f"{row['width']} x {row['height']}"
            raise DataError(
                f"{self.folder / 'sample_data.json'}: {row['token']} has image size {size}, expected both > 0"
            )
        lidar2cam = _inverse(self._sensor2ego(calibration["token"])) @ _inverse(ego2global) @ lidar2global
        intrinsic = self._intrinsic(calibration)
        return CameraRecord(channel, file, row["height"], row["width"], intrinsic.tolist(), lidar2cam.tolist())

    def _stand_in(self, channel: str, sample: dict) -> tuple[dict, dict]:
        """Calibration and size for a view without image: same scene first, then any calibration of the sensor."""
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
        size = next((r for r in self.nusc.sample_data if r["sensor_modality"] == "camera" and r["width"]), None)
        if calibration is None or size is None:
            raise DataError(
                f"{self.folder / 'calibrated_sensor.json'}: sample {sample['token']} has no {channel} image and no "
                f"calibration of {channel} exists to stand in"
            )
        return calibration, size

    def _pose(self, table: str, row: dict) -> np.ndarray:
        where = f"{self.folder / table}.json: {row['token']}"
        translation = np.asarray(row["translation"], dtype=np.float64)
        quaternion = np.asarray(row["rotation"], dtype=np.float64)
        if translation.shape != (3,) or not np.isfinite(translation).all():
            raise DataError(f"{where} has translation {row['translation']}, expected three finite numbers")
        if quaternion.shape != (4,) or not abs(np.linalg.norm(quaternion) - 1) < _QUATERNION_TOLERANCE:
            raise DataError(f"{where} has rotation {row['rotation']}, expected a quaternion of length 1")
        matrix = np.eye(4)
        matrix[:3, :3] = rotation_matrix(quaternion)
        matrix[:3, 3] = translation
        return matrix

    def _ego2global(self, sample_data: dict) -> np.ndarray:
        return self._pose("ego_pose", self.nusc.get("ego_pose", sample_data["ego_pose_token"]))

    def _sensor2ego(self, token: str) -> np.ndarray:
        if token not in self._calibrations:
            self._calibrations[token] = self._pose("calibrated_sensor", self.nusc.get("calibrated_sensor", token))
        return self._calibrations[token]

    def _intrinsic(self, calibration: dict) -> np.ndarray:
        where = f"{self.folder / 'calibrated_sensor.json'}: {calibration['token']}"
        intrinsic = np.asarray(calibration["camera_intrinsic"], dtype=np.float64)
        if intrinsic.shape != (3, 3) or not np.isfinite(intrinsic).all():
            raise DataError(
                f"{where} has camera_intrinsic {calibration['camera_intrinsic']}, expected 3 x 3 finite numbers"
            )
        if abs(determinant := np.linalg.det(intrinsic)) < _MIN_DETERMINANT:
            raise DataError(f"{where} has a singular camera_intrinsic: determinant {determinant:.3g}, expected not 0")
        return intrinsic

    def _box(self, row: dict, global2lidar: np.ndarray) -> list[float | None]:
        """Box (9) in the LiDAR frame; *Source*: mmdet3d `nuscenes_converter` with gravity centres."""
        where = f"{self.folder / 'sample_annotation.json'}: {row['token']}"
        width, length, height = row["size"]
        if not (np.isfinite(row["size"]).all() and min(row["size"]) > 0):
            raise DataError(f"{where} has size {row['size']}, expected three finite numbers > 0")
        pose = global2lidar @ self._pose("sample_annotation", row)
        velocity = self._velocity(row["token"])
        if velocity is not None:
            velocity = (global2lidar[:3, :3] @ (*velocity, 0.0))[:2].tolist()
        box = [*pose[:3, 3].tolist(), length, width, height, original_yaw(pose[:3, :3]), *(velocity or (None, None))]
        return [value if value is None else round(value, _BOX_DECIMALS) for value in box]

    def _velocity(self, token: str) -> tuple[float, float] | None:
        """Global vx, vy in m/s, None where unknown."""
        if self.velocities is not None and token in self.velocities:
            return self.velocities[token]
        vx, vy, _ = self.nusc.box_velocity(token)
        return (float(vx), float(vy)) if np.isfinite([vx, vy]).all() else None
