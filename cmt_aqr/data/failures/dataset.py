"""Samples under failures: all failures of a frame one after another, so that each file is read once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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
)
from cmt_aqr.data.failures.names import Failure
from cmt_aqr.data.frames import bare_sample, finish_images
from cmt_aqr.data.image_transforms import fixed_image_draw
from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.readers import image_size_of
from cmt_aqr.data.sample import Sample
from cmt_aqr.data.sampling import SampleKey


class FailureDataset(Dataset[Sample]):
    """Every frame under every failure: index = frame * number of failures + failure. None among them is a clean frame.

    Args:
        index: frames of the split.
        failures: None stands for a clean frame.
        final_size: (height, width) of the network's images; None: cameras are not used.
        num_sweeps: previous LiDAR sweeps added to the key frame's; None: LiDAR is not used.
        seed: of all random numbers.
    """

    def __init__(
        self,
        index: FrameIndex,
        failures: Sequence[Failure | None],
        *,
        final_size: tuple[int, int] | None,
        num_sweeps: int | None,
        seed: int,
    ):
        self.index = index
        self.failures = tuple(failures)
        self._final_size = final_size
        self._num_sweeps = num_sweeps
        self._seed = seed
        self._files = SensorFiles(index, num_sweeps=num_sweeps)
        if any(failure is not None and failure.definition.delay for failure in failures):
            self._files.find_history()
        self._clean: tuple[str, Sample] | None = None

    def __len__(self) -> int:
        return len(self.index) * len(self.failures)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        number, which = divmod(key.index if isinstance(key, SampleKey) else key, len(self.failures))
        frame, failure = self.index.frame(number), self.failures[which]
        clean = self._clean_sample(frame)
        return clean if failure is None else self._failing_sample(frame, failure, clean)

    def _clean_sample(self, frame: Frame) -> Sample:
        """The frame without a failure; cached, because a failure of one sensor leaves the other's data unchanged."""
        if self._clean is None or self._clean[0] != frame.token:
            sample = bare_sample(frame, "all")
            if self._num_sweeps is not None:
                sample = replace(sample, points=merge_sweeps(frame, self._files.sweeps(frame)))
            if self._final_size is not None:
                sample = self._with_images(frame, sample, [self._files.view(frame, i) for i in range(len(CAMERAS))])
            self._clean = frame.token, sample
        return self._clean[1]

    def _failing_sample(self, frame: Frame, failure: Failure, clean: Sample) -> Sample:
        case, sample = failure.definition, bare_sample(frame, "all")
        if self._num_sweeps is not None:
            is_affected = case.sweep or case.points or "lidar" in case.delayed
            points = self._failing_points(frame, failure, sample) if is_affected else clean.points
            sample = replace(sample, points=points)
        if self._final_size is None:
            return sample
        if not (case.image or case.calibration or "camera" in case.delayed):
            return replace(sample, images=clean.images, lidar2img=clean.lidar2img)
        lidar2img = fail_calibration(failure, sample.lidar2img, sample.lidar2ego, frame.token, self._seed)
        views = [
            self._files.view(past_frame(failure, self._files, frame, camera, self._seed), i)
            for i, camera in enumerate(CAMERAS)
        ]
        views = fail_views(failure, views, frame.token, self._seed)
        return self._with_images(frame, replace(sample, lidar2img=lidar2img), views)

    def _failing_points(self, frame: Frame, failure: Failure, sample: Sample) -> Tensor:
        source = past_frame(failure, self._files, frame, LIDAR, self._seed)
        if source is not frame:
            return merge_sweeps(source, self._files.sweeps(source))
        names = (frame.lidar_file, *(sweep.file for sweep in frame.sweeps))
        sweeps = self._files.sweeps(frame)
        sweeps = fail_sweeps(failure, sweeps, names[: len(sweeps)], frame.token, self._seed)
        return fail_points(failure, merge_sweeps(frame, sweeps), sample.targets.boxes, frame.token, self._seed)

    def _with_images(self, frame: Frame, sample: Sample, views: Sequence[np.ndarray]) -> Sample:
        draw = fixed_image_draw(image_size=image_size_of(frame), final_size=self._final_size)
        return finish_images(sample, views, draw)


class FailureSampler(Sampler[SampleKey]):
    """Keys of a :class:`FailureDataset` for one rank: every frame of its share under every failure.

    The loader gives batch i to worker i modulo the number of workers. With the order here every worker gets whole
    frames, failure after failure, so that it reads each file once.
    """

    def __init__(
        self, *, num_frames: int, num_failures: int, batch_size: int, num_workers: int, rank: int, world_size: int
    ):
        keys = [
            frame * num_failures + failure
            for frame in range(rank, num_frames, world_size)
            for failure in range(num_failures)
        ]
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        self.keys = [key for batch in _interleaved(batches, max(num_workers, 1)) for key in batch]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[SampleKey]:
        for key in self.keys:
            yield SampleKey(key)


def _interleaved(batches: list[list[int]], num_workers: int) -> list[list[int]]:
    """Batches in an order that gives every worker neighbours of the given list; the last one, maybe smaller, stays."""
    share, more = divmod(len(batches), num_workers)
    sizes = [share + (worker < more) for worker in range(num_workers)]
    last = (len(batches) - 1) % num_workers
    shares, start = {}, 0
    for worker in (*(w for w in range(num_workers) if w != last), last):
        shares[worker] = iter(batches[start : start + sizes[worker]])
        start += sizes[worker]
    return [next(shares[i % num_workers]) for i in range(len(batches))]
