"""Driving through one scene with all sensors on: the files of some samples, and their table rows."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cmt_aqr.files import write_bytes
from cmt_aqr.synthetic import backdrop
from cmt_aqr.synthetic.calibration import CAMERAS, LIDAR_CHANNEL, LIDAR_TRANSLATION, yaw_quaternion
from cmt_aqr.synthetic.camera import CameraRig
from cmt_aqr.synthetic.lidar import FROM_AIR, Lidar, Scan, parts_in_sensor_frame
from cmt_aqr.synthetic.scenes import KEYFRAME_INTERVAL, NO_LABEL, Scene, build_scene
from cmt_aqr.synthetic.shapes import GROUND_CLEARANCE
from cmt_aqr.synthetic.tables import calibration_token, token

ANNOTATION_RANGE = 65.0
"""Objects whose centre is nearer (m) than this to the ego are annotated."""

VALIDATION_OFFSET = 100_000
"""Validation scene k is scene VALIDATION_OFFSET + k, and so is the same whatever the number of training scenes."""

_EPOCH_US = 1_577_836_800_000_000
_SCENE_SPACING_US = 600_000_000
_LIDAR_JITTER_US, _CAMERA_JITTER_US = 800, 300
_JPEG_QUALITY = 85
# ANNOTATION_RANGE of a world of tables alone.
_TABLES_RANGE = 30.0
# LiDAR points of an object that is guessed to be hit, times the square of its distance in metres.
_POINTS_AT_1_M = 3000


@dataclass(frozen=True)
class WorldSettings:
    """What the bytes of a world depend on; nothing else does.

    Attributes:
        scenes, val_scenes: scenes of the splits "synthetic_train" and "synthetic_val".
        image_size: width, height in pixels.
        sweeps_per_keyframe: LiDAR sweeps between two key frames; 9 is nuScenes' 20 Hz.
        lidar_columns: firings of a sweep; nuScenes has 1084.
        sensor_files: False writes the tables alone, with the same tokens and file names, to try programs on as many
            frames as nuScenes has; only boxes within 30 m are then annotated, some 50 a frame, their
            points are guessed, and all of them count as visible.
    """

    scenes: int
    val_scenes: int
    seed: int
    samples_per_scene: int = 20
    image_size: tuple[int, int] = (1600, 900)
    sweeps_per_keyframe: int = 9
    lidar_columns: int = 1084
    sensor_files: bool = True

    def scene_indices(self) -> dict[str, list[int]]:
        """Scene indices of the two splits."""
        return {
            "synthetic_train": list(range(self.scenes)),
            "synthetic_val": [VALIDATION_OFFSET + k for k in range(self.val_scenes)],
        }

    def token(self, *words: object) -> str:
        """A token of this world; a world with more scenes keeps those of the scenes it shares with a smaller one."""
        return token(self._salt, *words)

    @cached_property
    def _salt(self) -> str:
        """What sets this world's tokens apart."""
        parameters = (self.seed, self.samples_per_scene, *self.image_size, self.sweeps_per_keyframe, self.lidar_columns)
        return "/".join(map(str, parameters))


def scene_name(index: int) -> str:
    """Name of a scene in the scene table and the splits."""
    split, number = ("val", index - VALIDATION_OFFSET) if index >= VALIDATION_OFFSET else ("train", index)
    return f"synthetic-{split}-{number:04d}"


class Sighting(NamedTuple):
    """One annotation: an actor in a sample.

    label: index of CLASSES; size: width, length, height (m); position x y z (m, global); yaw (rad); visible: share 0..1
    of its pixels that nothing hides, over all cameras (0 where no camera sees it).
    """

    actor: int
    sample: int
    label: int
    size: tuple[float, float, float]
    position: tuple[float, float, float]
    yaw: float
    attribute: str
    num_lidar_pts: int
    visible: float


@dataclass(frozen=True)
class Block:
    """What record_block returns: table rows of some consecutive samples of one scene, in order, and its description."""

    scene: int
    description: str
    samples: list[dict]
    sample_data: list[dict]
    ego_pose: list[dict]
    sightings: list[Sighting]


class _Recorder:
    """Writes sensor files and collects rows for samples of one scene."""

    def __init__(self, world: WorldSettings, index: int, root: Path):
        self.world, self.index, self.root = world, index, root
        self.scene: Scene = build_scene(world.seed, index, world.samples_per_scene)
        if world.sensor_files:
            self._rig = CameraRig(self.scene, world.image_size, world.seed)
            self._lidar = Lidar(world.lidar_columns, self.scene.conditions)
        self._stamps = self._lidar_stamps()
        self._camera_stamps = self._draw_camera_stamps()
        self.samples, self.sample_data, self.ego_pose, self.sightings = [], [], [], []

    def record(self, sample: int) -> None:
        """Write every file of a sample: the sweeps before it, its key frame's LiDAR sweep and its images."""
        time = self._seconds(self._key_stamp(sample))
        actors = self.scene.nearby(time)
        scan = self._record_sweeps(sample, actors)
        visible = self._record_images(sample, actors)
        self._annotate(sample, time, actors, scan, visible)
        self.samples.append(
            {
                "token": self._sample_token(sample),
                "timestamp": int(self._key_stamp(sample)),
                "prev": self._sample_token(sample - 1),
                "next": self._sample_token(sample + 1),
                "scene_token": self.world.token("scene", self.index),
            }
        )

    def _lidar_stamps(self) -> np.ndarray:
        per_frame = self.world.sweeps_per_keyframe + 1
        count = (self.world.samples_per_scene - 1) * per_frame + 1
        rng = np.random.default_rng([self.world.seed, self.index, 4])
        jitter = rng.integers(-_LIDAR_JITTER_US, _LIDAR_JITTER_US + 1, count)
        jitter[0] = 0
        nominal = np.rint(np.arange(count) * (KEYFRAME_INTERVAL / per_frame * 1e6)).astype(np.int64)
        return self._start_stamp() + nominal + jitter

    def _draw_camera_stamps(self) -> np.ndarray:
        rng = np.random.default_rng([self.world.seed, self.index, 5])
        jitter = rng.integers(-_CAMERA_JITTER_US, _CAMERA_JITTER_US + 1, (self.world.samples_per_scene, len(CAMERAS)))
        delay = np.array([round(camera.delay_s * 1e6) for camera in CAMERAS])
        keys = self._stamps[:: self.world.sweeps_per_keyframe + 1]
        return keys[:, None] + delay + jitter

    def _start_stamp(self) -> int:
        return _EPOCH_US + self.index * _SCENE_SPACING_US

    def _key_stamp(self, sample: int) -> int:
        return int(self._stamps[sample * (self.world.sweeps_per_keyframe + 1)])

    def _seconds(self, stamp):
        """Time in the scene (s) of time stamps, an integer or an array of them."""
        return (stamp - self._start_stamp()) * 1e-6

    def _sample_token(self, sample: int) -> str:
        exists = 0 <= sample < self.world.samples_per_scene
        return self.world.token("sample", self.index, sample) if exists else ""

    def _record_sweeps(self, sample: int, actors: np.ndarray) -> Scan | None:
        """Write the LiDAR sweeps since the last key frame; returns the last one, that of this sample's key frame."""
        per_frame = self.world.sweeps_per_keyframe + 1
        numbers = range(max(sample * per_frame - per_frame + 1, 0), sample * per_frame + 1)
        times = self._seconds(self._stamps[numbers.start : numbers.stop])
        egos = self.scene.ego_poses(times).tolist()
        paths = [self._add_sweep(sample, number, ego) for number, ego in zip(numbers, egos, strict=True)]
        if not self.world.sensor_files:
            return None
        poses = self.scene.poses(times, actors)
        chosen, slot = parts_of(self.scene, actors)
        sensors = np.stack([lidar_pose(ego) for ego in egos])
        parts = parts_in_sensor_frame(self.scene.parts[chosen], poses.take(slot, axis=1), sensors)
        rng = np.random.default_rng([self.world.seed, self.index, 6, sample])
        scans = self._lidar.scans(parts, self.scene.part_reflectivity[chosen], rng)
        for path, scan in zip(paths, scans, strict=True):
            write_bytes(path, scan.points)
        return scan

    def _add_sweep(self, sample: int, number: int, ego: tuple[float, float, float]) -> Path:
        """Add the rows of a LiDAR sweep; returns its file's path."""
        is_key = number % (self.world.sweeps_per_keyframe + 1) == 0
        stamp = int(self._stamps[number])
        return self._add_data(LIDAR_CHANNEL, number, len(self._stamps), sample, stamp, ego, is_key=is_key)

    def _record_images(self, sample: int, actors: np.ndarray) -> np.ndarray:
        """Write the six images. Returns the visible share (N,) of every actor of the scene over all of them."""
        stamps = self._camera_stamps[sample]
        if not self.world.sensor_files:
            egos = self.scene.ego_poses(self._seconds(stamps)).tolist()
            for mount, stamp, ego in zip(CAMERAS, stamps.tolist(), egos, strict=True):
                self._add_data(mount.channel, sample, self.world.samples_per_scene, sample, stamp, ego)
            return np.ones(len(self.scene.s))
        drawn, visible = np.zeros(len(self.scene.s)), np.zeros(len(self.scene.s))
        rng = np.random.default_rng([self.world.seed, self.index, 7, sample])
        views = self._rig.render(self._seconds(stamps), actors, rng)
        for mount, stamp, view in zip(CAMERAS, stamps.tolist(), views, strict=True):
            drawn[view.actors] += view.drawn
            visible[view.actors] += view.visible
            path = self._add_data(mount.channel, sample, self.world.samples_per_scene, sample, stamp, view.ego)
            _, data = cv2.imencode(".jpg", view.image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            write_bytes(path, data)
        return (visible / np.maximum(drawn, 1)).clip(0.0, 1.0)

    def _add_data(
        self,
        channel: str,
        number: int,
        count: int,
        sample: int,
        stamp: int,
        ego: tuple[float, float, float],
        *,
        is_key: bool = True,
    ) -> Path:
        """Add the sample_data and ego_pose rows of data item number of count of a channel; returns its file's path."""

        def name(at: int) -> str:
            return self.world.token("sample_data", self.index, channel, at) if 0 <= at < count else ""

        is_lidar = channel == LIDAR_CHANNEL
        folder, ending = "samples" if is_key else "sweeps", "pcd.bin" if is_lidar else "jpg"
        file = f"{folder}/{channel}/{scene_name(self.index)}__{channel}__{stamp}.{ending}"
        width, height = (0, 0) if is_lidar else self.world.image_size
        x, y, yaw = ego
        self.sample_data.append(
            {
                "token": name(number),
                "sample_token": self._sample_token(sample),
                "ego_pose_token": name(number),
                "calibrated_sensor_token": calibration_token(channel, self.world.image_size),
                "timestamp": stamp,
                "fileformat": "pcd" if is_lidar else "jpg",
                "is_key_frame": is_key,
                "height": height,
                "width": width,
                "filename": file,
                "prev": name(number - 1),
                "next": name(number + 1),
            }
        )
        self.ego_pose.append(
            {
                "token": name(number),
                "timestamp": stamp,
                "rotation": yaw_quaternion(yaw),
                "translation": [round(x, 6), round(y, 6), 0.0],
            }
        )
        return self.root / file

    def _annotate(self, sample: int, time: float, actors: np.ndarray, scan: Scan | None, visible: np.ndarray) -> None:
        scene = self.scene
        x, y, yaw = scene.ego_pose(time)
        chosen, _ = parts_of(scene, actors)
        actors = actors[scene.label[actors] != NO_LABEL]
        poses = scene.poses(np.array([time]), actors)[0]
        reach = ANNOTATION_RANGE if scan is not None else _TABLES_RANGE
        near = np.hypot(poses[:, 0] - x, poses[:, 1] - y) < reach
        actors, poses = actors[near], poses[near]
        if scan is None:
            points = (_POINTS_AT_1_M / np.square(poses[:, :2] - (x, y)).sum(1).clip(1.0)).astype(int)
        else:
            part = scan.part
            hits = np.bincount(scene.part_actor[chosen][part[part >= 0]], minlength=len(scene.s))
            points = hits[actors] + _ghosts_in_boxes(scan, scene.size[actors], poses, lidar_pose((x, y, yaw)))
        speeds = np.linalg.norm(scene.velocities(np.array([time]), actors)[0], axis=-1)
        columns = (actors, scene.label[actors], scene.size[actors], poses, speeds, points, visible[actors])
        for actor, label, size, (x, y, yaw), speed, count, share in zip(*(c.tolist() for c in columns), strict=True):
            position = (round(x, 5), round(y, 5), round(scene.centre_height(actor), 5))
            attribute = scene.attribute(actor, speed)
            self.sightings.append(Sighting(actor, sample, label, tuple(size), position, yaw, attribute, count, share))


def lidar_pose(ego: tuple[float, float, float]) -> tuple[float, float, float]:
    """Global x (m), y (m) and yaw (rad) of the LiDAR's axes for an ego pose."""
    x, y, yaw = ego
    forward = LIDAR_TRANSLATION[0]
    return x + forward * np.cos(yaw), y + forward * np.sin(yaw), yaw - np.pi / 2


def parts_of(scene: Scene, actors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (p,) of the parts of actors (n,), and for each the position of its actor in actors."""
    slot = np.full(len(scene.s), -1)
    slot[actors] = np.arange(len(actors))
    chosen = np.flatnonzero(slot[scene.part_actor] >= 0)
    return chosen, slot[scene.part_actor[chosen]]


def _ghosts_in_boxes(scan: Scan, size: np.ndarray, poses: np.ndarray, sensor: tuple[float, float, float]) -> np.ndarray:
    """How many points from rain or fog happen to lie inside each box (n,); all others are known by what they hit."""
    ghosts = scan.points[scan.part == FROM_AIR, :3].astype(np.float64)
    cos, sin = np.cos(sensor[2]), np.sin(sensor[2])
    x = sensor[0] + ghosts[:, 0] * cos - ghosts[:, 1] * sin
    y = sensor[1] + ghosts[:, 0] * sin + ghosts[:, 1] * cos
    z = ghosts[:, 2] + LIDAR_TRANSLATION[2] - GROUND_CLEARANCE
    dx, dy = x - poses[:, :1], y - poses[:, 1:2]
    cos, sin = np.cos(poses[:, 2:]), np.sin(poses[:, 2:])
    width, length, height = size.T[..., None]
    inside = (np.abs(dx * cos + dy * sin) <= length / 2) & (np.abs(dy * cos - dx * sin) <= width / 2)
    return (inside & (z >= 0) & (z <= height)).sum(1)


@lru_cache(maxsize=1)
def _recorder(world: WorldSettings, index: int, root: Path) -> _Recorder:
    """One block after another of a scene need not build it again."""
    return _Recorder(world, index, root)


def release() -> None:
    """Forget what record_block keeps for the next block (hundreds of megabytes at full image size)."""
    _recorder.cache_clear()
    backdrop.release()


def record_block(world: WorldSettings, index: int, first: int, end: int, root: Path, tick=None) -> Block:
    """Write the files of samples first..end - 1 of scene index under root; tick() is called after each sample."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        recorder = _recorder(world, index, root)
        recorder.samples, recorder.sample_data, recorder.ego_pose, recorder.sightings = [], [], [], []
        for sample in range(first, end):
            recorder.record(sample)
            if tick is not None:
                tick()
    finally:
        cv2.setNumThreads(threads)
    return Block(
        index,
        recorder.scene.conditions.describe(),
        recorder.samples,
        recorder.sample_data,
        recorder.ego_pose,
        recorder.sightings,
    )
