"""Which frames an epoch visits, and in which order: class balancing, shuffling, sharding over processes.

A sampler yields `SampleKey`s instead of bare indices: a worker is told the epoch with every index, so schedules and
seeds are right even in workers that live for the whole training and load ahead.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What a dataset is indexed with.

    Attributes:
        index: frame in the dataset.
        epoch: counts from 0.
        position: in the epoch's global order, the same for every number of processes; it tells repeats of one frame
            apart.
    """

    index: int
    epoch: int = 0
    position: int = 0


def class_balanced_indices(frame_labels: Sequence[Sequence[int]], rng: np.random.Generator) -> np.ndarray:
    """Draw frames with replacement so that every class present gets an equal share of the draws.

    Args:
        frame_labels: for every frame the labels it contains (without repeats).
        rng: numpy generator.

    Returns:
        (N,) int64 frame indices, grouped by class, N close to the number of (frame, class) pairs; when no frame has
        a label, every frame once.

    *Source*: CBGS (Zhu et al. 2019), as in mmdet3d `CBGSDataset`, except that classes no frame has get no share.
    """
    frames_of: dict[int, list[int]] = {}
    for frame, labels in enumerate(frame_labels):
        for label in labels:
            frames_of.setdefault(label, []).append(frame)
    if not frames_of:
        return np.arange(len(frame_labels))
    share = sum(map(len, frames_of.values())) // len(frames_of)
    return np.concatenate([rng.choice(frames_of[label], share) for label in sorted(frames_of)])


class TrainingSampler(Sampler[SampleKey]):
    """Shuffled, optionally class-balanced keys; every rank gets equally many.

    The order is a function of (seed, epoch) alone; rank r takes positions r, r + world_size, ... of it. The order is
    extended by its own beginning to a multiple of `world_size`.
    """

    def __init__(
        self,
        *,
        frame_labels: Sequence[Sequence[int]],
        class_balanced: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Set up.

        Args:
            frame_labels: for every frame the labels it contains, such as `FrameIndex.frame_labels`.
            class_balanced: resample in every epoch so that classes get equal shares.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.
        """
        _check_rank(rank, world_size)
        self._frame_labels = frame_labels
        self._class_balanced = class_balanced
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._first = 0
        self._length = -(-len(self._order()) // world_size)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch of the next iteration and how many of this rank's keys it skips; call before iterating."""
        self._epoch = epoch
        self._first = first

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order()
        start = self._rank + self._first * self._world_size
        for position in range(start, self._length * self._world_size, self._world_size):
            yield SampleKey(int(order[position % len(order)]), self._epoch, position)

    def _order(self) -> np.ndarray:
        rng = np.random.default_rng((self._seed, self._epoch))
        if self._class_balanced:
            return rng.permutation(class_balanced_indices(self._frame_labels, rng))
        return rng.permutation(len(self._frame_labels))


class EvaluationSampler(Sampler[SampleKey]):
    """Every frame exactly once over all ranks, in order; shard lengths differ by at most one."""

    def __init__(self, *, num_frames: int, rank: int = 0, world_size: int = 1):
        _check_rank(rank, world_size)
        self._positions = range(rank, num_frames, world_size)

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[SampleKey]:
        for position in self._positions:
            yield SampleKey(position, 0, position)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"sampler: rank is {rank}, expected 0 <= rank < world_size = {world_size}")
