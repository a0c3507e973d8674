"""Failures in training: drawn for every sample, after objects are pasted and before augmentation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.failures.apply import (
    LIDAR,
    SensorFiles,
    fail_calibration,
    fail_points,
    fail_sweeps,
    fail_views,
    merge_sweeps,
    past_frame,
    split_sweeps,
)
from cmt_aqr.data.failures.names import Failure, parse_failure
from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.sample import Sample


@dataclass(frozen=True)
class TrainingFailures:
    """Failures in training: each of the entries occurs independently with its probability.

    Attributes:
        choices: for each entry the failures of its name, one of which is drawn, and the probability. Merged points are
            split into sweeps again; their ring indices are lost, so the beam of a point is found by its elevation.
        files: of the split, for sensors that deliver data of earlier frames.
        num_sweeps: previous LiDAR sweeps added to the key frame's.
    """

    choices: tuple[tuple[tuple[Failure, ...], float], ...]
    files: SensorFiles
    num_sweeps: int

    def fail(
        self, frame: Frame, sample: Sample, views: Iterable[np.ndarray] | None, rng: np.random.Generator
    ) -> tuple[Sample, Iterable[np.ndarray] | None]:
        """Draw failures and apply them, one after another.

        Args:
            frame: of the sample.
            sample: not yet augmented, its points merged, objects pasted or not.
            views: images as on disk; None: no images.
            rng: of this sample.
        """
        for failures, probability in self.choices:
            # Everything is drawn whether it is used or not, so that a probability does not change later draws.
            happens, which, seed = rng.random() < probability, rng.integers(len(failures)), int(rng.integers(2**63))
            if happens:
                views = None if views is None else list(views)
                sample, views = self._fail(failures[which], seed, frame, sample, views)
        return sample, views

    def _fail(
        self, failure: Failure, seed: int, frame: Frame, sample: Sample, views: list[np.ndarray] | None
    ) -> tuple[Sample, list[np.ndarray] | None]:
        if sample.points is not None:
            sample = replace(sample, points=self._points(failure, seed, frame, sample))
        lidar2img = fail_calibration(failure, sample.lidar2img, sample.lidar2ego, frame.token, seed)
        if views is not None:
            past = [past_frame(failure, self.files, frame, camera, seed) for camera in CAMERAS]
            views = [views[i] if source is frame else self.files.view(source, i) for i, source in enumerate(past)]
            views = fail_views(failure, views, frame.token, seed)
        return replace(sample, lidar2img=lidar2img), views

    def _points(self, failure: Failure, seed: int, frame: Frame, sample: Sample) -> Tensor:
        source = past_frame(failure, self.files, frame, LIDAR, seed)
        if source is not frame:
            return merge_sweeps(source, self.files.sweeps(source))
        points = sample.points
        if failure.definition.sweep is not None:
            names = (frame.lidar_file, *(sweep.file for sweep in frame.sweeps))
            sweeps = split_sweeps(frame, points, self.num_sweeps)
            sweeps = fail_sweeps(failure, sweeps, names[: len(sweeps)], frame.token, seed)
            points = merge_sweeps(frame, sweeps)
        return fail_points(failure, points, sample.targets.boxes, frame.token, seed)


def training_failures(
    entries: Sequence[tuple[str, float]], index: FrameIndex, *, num_sweeps: int
) -> TrainingFailures | None:
    """Failures from the entries (name, probability) of a configuration; None without entries.

    Raises:
        DataError: see :func:`cmt_aqr.data.failures.names.parse_failure`.
    """
    if not entries:
        return None
    choices = tuple((tuple(parse_failure(name, "data.failures")), probability) for name, probability in entries)
    files = SensorFiles(index, num_sweeps=num_sweeps)
    if any(failure.definition.delay for failures, _ in choices for failure in failures):
        files.find_history()
    return TrainingFailures(choices, files, num_sweeps)
