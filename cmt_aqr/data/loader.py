"""Batches from a dataset, in worker processes or in this one, with user errors intact."""

import multiprocessing.connection
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from cmt_aqr.data.sample import Batch, DataError, Sample, collate
from cmt_aqr.data.sampling import EvaluationSampler, SampleKey, TrainingSampler


class _ErrorsAsValues(Dataset):
    """Returns a `DataError` as a value, because the DataLoader would hide its sentence in a worker's traceback."""

    def __init__(self, dataset: Dataset[Sample]):
        self._dataset = dataset

    def __getitem__(self, key: SampleKey) -> Sample | DataError:
        try:
            return self._dataset[key]
        except DataError as error:
            return DataError(str(error))


def _collate(samples: list[Sample | DataError]) -> Batch | DataError:
    error = next((sample for sample in samples if isinstance(sample, DataError)), None)
    return collate(samples) if error is None else error


@contextmanager
def explain_killed_worker(advice: str) -> Iterator[None]:
    """Turn PyTorch's error about a killed worker, which can be raised at any moment, into one sentence.

    Args:
        advice: what to lower besides data.workers, and what to do next.

    Raises:
        DataError: a worker was killed; names its process.
    """
    try:
        yield
    except RuntimeError as error:
        worker = re.search(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\)", str(error))
        if worker is None:
            raise
        raise DataError(
            f"a data worker (pid {worker[1]}) was killed, most likely by lack of memory; lower data.workers or {advice}"
        ) from None


def start_worker(worker: int) -> None:
    """Set up a data worker, as `DataLoader.worker_init_fn`: one thread, and stopped by the main process alone."""
    # Ctrl-C in a terminal reaches the workers too; the main process decides when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _next_item(items: Iterator, workers: list[multiprocessing.Process]) -> Batch | DataError | None:
    """The next item, None at the end. A worker that dies while it sends a tensor breaks a connection instead."""
    try:
        return next(items, None)
    except (ConnectionError, EOFError):
        multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
        killed = [str(worker.pid) for worker in workers if worker.exitcode]
        if not killed:
            raise
        raise RuntimeError(f"DataLoader worker (pid {', '.join(killed)}) was killed") from None


class Loader:
    """Iterates over batches of one epoch; made by :func:`make_loader`."""

    def __init__(self, loader: DataLoader, sampler: TrainingSampler | EvaluationSampler):
        self._loader = loader
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the training epoch of the next iteration: order, augmentation draws and schedules follow it.

        Args:
            epoch: counts from 0.
            first_batch: batches of the epoch that a resumed run has finished; they are not loaded.
        """
        self._sampler.set_epoch(epoch, first_batch * self._loader.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self._loader)
        workers = multiprocessing.active_children() if self._loader.num_workers else []
        while (item := _next_item(items, workers)) is not None:
            if isinstance(item, DataError):
                # A new object: `raise item` would tie this frame, and with it the workers, into a reference cycle.
                raise DataError(str(item))
            yield item


def make_loader(
    dataset: Dataset[Sample],
    *,
    sampler: TrainingSampler | EvaluationSampler,
    batch_size: int,
    num_workers: int,
    drop_last: bool = False,
    pin_memory: bool | None = None,
    prefetch_factor: int = 2,
) -> Loader:
    """Make a loader.

    Args:
        dataset: yields Samples, takes `SampleKey`s.
        sampler: order of the keys, of this rank only.
        batch_size: samples a batch, on this rank.
        num_workers: worker processes, which live as long as the loader; 0 loads in this process.
        drop_last: leave out a last, smaller batch (training).
        pin_memory: page-locked batches; None: where CUDA is available.
        prefetch_factor: batches that each worker prepares in advance.

    Returns:
        The loader. Batches are the same for every `num_workers`. A `DataError` in a worker is raised here with the same
        sentence.
    """
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
    )
    return Loader(loader, sampler)
