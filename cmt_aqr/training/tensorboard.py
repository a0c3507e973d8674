"""Scalars for TensorBoard, written by the caller's thread.

PyTorch's SummaryWriter writes in a thread of its own, where a full disk raises an error that the caller cannot catch.
"""

import itertools
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

_files = itertools.count()


class ScalarWriter:
    """One event file of a run."""

    def __init__(self, folder: Path, purge_step: int | None):
        """Open the file.

        Args:
            folder: made when absent.
            purge_step: TensorBoard forgets what earlier files hold from this step on; None forgets nothing.

        Raises:
            OSError: the file cannot be written.
        """
        # Imported here: it takes a second, and only the main process of a training run needs it.
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        # Unbuffered: nothing is left that closing the file could fail to write.
        self._file = open(folder / name, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, scalars: Iterable[tuple[str, float]], step: int) -> None:
        """Write named numbers of one step; OSError where that fails."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
