"""Failures applied to the data of a frame: to files before anything is merged or resized, then to arrays.

Every number is drawn from a generator of (seed, case, sample token, file), so a frame fails in the same way in any
batch, order or process. A failure leaves ground truth and calibration unchanged, except calibration noise.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.failures.names import Failure
from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.readers import place_sweep, read_points, read_view

LIDAR = "LIDAR_TOP"
# Files that a process keeps in memory: those of two frames of nuScenes with ten sweeps.
FILES_KEPT = 36


def generator(seed: int, case: str, token: str, file: str) -> np.random.Generator:
    """The random generator of one case in one file of one sample; it does not depend on the severity."""
    digest = hashlib.sha256("\0".join((str(seed), case, token, file)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class SensorFiles:
    """Files of a split as read from disk; the latest ones are kept in memory for the next failure of the frame."""

    def __init__(self, index: FrameIndex, *, num_sweeps: int | None):
        self._index = index
        self._num_sweeps = num_sweeps
        self._kept: dict[str, np.ndarray] = {}
        self._history: dict[str, list[int]] = {}

    def view(self, frame: Frame, number: int) -> np.ndarray:
        """(H, W, 3) uint8 of one camera as on disk; black where the frame has none. Read-only."""
        camera = frame.cameras[number]
        return self._keep(camera.file or f"black {camera.height} x {camera.width}", lambda: read_view(
            camera, self._index.dataroot))  # fmt: skip

    def sweeps(self, frame: Frame) -> list[np.ndarray]:
        """Key frame and sweeps (P, 5) float32 with ring indices, each in its own frame. Read-only."""
        files = (frame.lidar_file, *(sweep.file for sweep in frame.sweeps[: self._num_sweeps]))
        return [self._keep(file, lambda file=file: read_points(self._index.dataroot / file).numpy()) for file in files]

    def history(self, frame: Frame) -> list[int]:
        """Frame numbers of the scene up to this frame, this one first."""
        if not self._history:
            self.find_history()
        return self._history[frame.token]

    def find_history(self) -> None:
        """Sort the key frames of every scene by time; to be called before workers start, so that they share it."""
        scenes: dict[str, list[tuple[int, int, str]]] = {}
        for number in range(len(self._index)):
            frame = self._index.frame(number)
            scenes.setdefault(frame.scene, []).append((frame.timestamp, number, frame.token))
        for frames in scenes.values():
            past: list[int] = []
            for _, number, token in sorted(frames):
                past.insert(0, number)
                self._history[token] = list(past)

    def frame(self, number: int) -> Frame:
        """Frame of the split."""
        return self._index.frame(number)

    def token(self, number: int) -> str:
        """Sample token of the split."""
        return self._index.tokens[number]

    def _keep(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        if name not in self._kept:
            while len(self._kept) >= FILES_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = read()
        return self._kept[name]


def past_frame(failure: Failure, files: SensorFiles, frame: Frame, sensor: str, seed: int) -> Frame:
    """The frame whose data a sensor (a camera's channel, or LIDAR_TOP) delivers: this one or an earlier one."""
    case = failure.definition
    if case.delay is None or ("lidar" if sensor == LIDAR else "camera") not in case.delayed:
        return frame
    history = files.history(frame)
    back = case.delay(
        [files.token(number) for number in history],
        failure.parameter,
        lambda token: generator(seed, failure.case, token, sensor).random(),
    )
    return files.frame(history[back]) if back else frame


def fail_views(failure: Failure, views: Sequence[np.ndarray], token: str, seed: int) -> list[np.ndarray]:
    """Images (H, W, 3) uint8 as on disk, in the order of ``CAMERAS``."""
    change = failure.definition.image
    if change is None:
        return list(views)
    return [
        change(view, failure.parameter, generator(seed, failure.case, token, camera))
        if failure.views is None or camera in failure.views
        else view
        for camera, view in zip(CAMERAS, views, strict=True)
    ]


def fail_sweeps(
    failure: Failure, sweeps: Sequence[np.ndarray], names: Sequence[str], token: str, seed: int
) -> list[np.ndarray]:
    """LiDAR files (P, 5) with ring indices, each in its own frame; ``names`` are those of the files."""
    change = failure.definition.sweep
    if change is None:
        return list(sweeps)
    return [
        change(points, failure.parameter, generator(seed, failure.case, token, name))
        for points, name in zip(sweeps, names, strict=True)
    ]


def fail_points(failure: Failure, points: Tensor, boxes: Tensor, token: str, seed: int) -> Tensor:
    """The merged points (P, 5) of a frame with boxes (G, 9)."""
    change = failure.definition.points
    if change is None:
        return points
    rng = generator(seed, failure.case, token, LIDAR)
    return torch.from_numpy(change(points.numpy(), boxes, failure.parameter, rng))


def fail_calibration(failure: Failure, lidar2img: Tensor, lidar2ego: Tensor, token: str, seed: int) -> Tensor:
    """The calibration that the network is given, (V, 4, 4) float64."""
    change = failure.definition.calibration
    if change is None:
        return lidar2img
    views = range(len(lidar2img)) if failure.views is None else [CAMERAS.index(view) for view in failure.views]
    return change(lidar2img, lidar2ego, views, failure.parameter, generator(seed, failure.case, token, "calibration"))


def merge_sweeps(frame: Frame, sweeps: Sequence[np.ndarray]) -> Tensor:
    """Files of a frame, key frame first -> (P, 5) in the key frame's LiDAR frame with the time lag as fifth column."""
    key = torch.from_numpy(sweeps[0]).clone()
    key[:, 4] = 0
    placed = [key]
    for sweep_points, sweep in zip(sweeps[1:], frame.sweeps, strict=False):
        points = torch.from_numpy(sweep_points).clone()
        place_sweep(points, torch.tensor(sweep.sweep2key, dtype=torch.float64), sweep.time_lag)
        placed.append(points)
    return torch.cat(placed)


def split_sweeps(frame: Frame, points: Tensor, num_sweeps: int) -> list[np.ndarray]:
    """The inverse of :func:`merge_sweeps`, without ring indices; points of pasted objects may be among the merged ones.

    A point goes to the sweep with the nearest time lag: the lags of pasted points are those of another frame.
    """
    sweeps = frame.sweeps[:num_sweeps]
    lags = torch.tensor([0.0, *(sweep.time_lag for sweep in sweeps)])
    nearest = (points[:, 4:5] - lags).abs().argmin(dim=1)
    files = []
    for number in range(len(lags)):
        sweep_points = points[nearest == number]
        if number:
            key2sweep = torch.linalg.inv(torch.tensor(sweeps[number - 1].sweep2key, dtype=torch.float64))
            place_sweep(sweep_points, key2sweep, 0.0)
        sweep_points[:, 4] = 0
        files.append(sweep_points.numpy())
    return files
