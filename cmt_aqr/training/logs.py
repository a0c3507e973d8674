"""The output of a run: ``log.jsonl``, TensorBoard scalars, a progress bar or plain lines.

``step`` is the number of finished optimizer steps. Every line of ``log.jsonl`` is one JSON object with ``kind``
(train, eval, ...), ``step``, ``time`` (seconds since 1970) and whatever the caller measured; a number that is not
finite is null.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from tqdm.std import EMA

from cmt_aqr.errors import UserError
from cmt_aqr.files import atomic_path
from cmt_aqr.progress import LINE, make_bar
from cmt_aqr.training.tensorboard import ScalarWriter

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# Seconds between two progress lines where stderr is no terminal.
PLAIN_PERIOD = 30.0
# Weight of the newest value in a smoothed metric: about the last 50 steps count.
SMOOTHING = 0.02

Values = Mapping[str, Any]


class LogError(UserError):
    """A log that cannot be written, read or continued; one sentence with the file."""


class RunLog:
    """The log of one run; a context manager. In a process that is not the main one it does nothing at all."""

    def __init__(
        self,
        work_dir: str | os.PathLike,
        is_main: bool,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        plain_period: float = PLAIN_PERIOD,
    ):
        """Open the log.

        Args:
            work_dir: made when absent.
            is_main: whether this process writes.
            resume_step: the step of the checkpoint that the run resumes from: lines of later steps are dropped, new
                ones are appended. None is a new run: an older log is kept as ``log.1.jsonl``, ``log.2.jsonl`` ...
            tensorboard: also write scalars below ``work_dir/tensorboard``.
            plain_period: seconds between progress lines where stderr is no terminal.

        Raises:
            LogError: the log cannot be written, or a line of the log to append to is not JSON.
        """
        self.path = Path(work_dir) / LOG_FILE
        self._is_main = is_main
        self._plain_period = plain_period
        self._writer = None
        if not is_main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                _set_aside(self.path)
            elif self.path.exists():
                _keep_until(self.path, resume_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._unwritable(error) from error
        if tensorboard:
            try:
                purge_step = 0 if resume_step is None else resume_step + 1
                self._writer = ScalarWriter(self.path.parent / TENSORBOARD_FOLDER, purge_step)
            except OSError as error:
                self._give_up_tensorboard(error)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Write one line, and its numbers as TensorBoard scalars ``kind/name`` (``kind/name/key`` for a mapping).

        Args:
            kind: train, eval, ...
            step: finished optimizer steps.
            values: numbers, tensors of one element, text, None, or mappings of these.

        Raises:
            LogError: the line cannot be written.
            ValueError: a value of another kind.
        """
        if not self._is_main:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | _plain(values)
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if self._writer is not None:
                self._writer.add(_scalars(values, kind), step)
        except OSError as error:
            self._give_up_tensorboard(error)

    def print(self, text: str) -> None:
        """Print a line to stdout without tearing a progress bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator["Progress"]:
        """Show how far a loop is: a bar on a terminal (stderr), else a line on stdout now and then.

        Args:
            title: what is being counted.
            total: steps of the whole; the remaining time is that to ``total``.
            done: steps done before.
        """
        bar = None
        if self._is_main:
            bar = make_bar(
                title, total, "step", done=done, smoothing=SMOOTHING, write=self.print, period=self._plain_period
            )
        progress = Progress(bar)
        try:
            yield progress
        finally:
            progress.close()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self._is_main

    def close(self) -> None:
        """Close the files; no record may follow.

        Raises:
            LogError: what is left cannot be written.
        """
        if not self._is_main:
            return
        if self._writer is not None:
            self._writer.close()
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LogError:
        return LogError(f"{self.path}: the log cannot be written: {error.strerror}; the checkpoints are untouched")

    def _give_up_tensorboard(self, error: OSError) -> None:
        """Continue without TensorBoard: log.jsonl has the same numbers."""
        folder = self.path.parent / TENSORBOARD_FOLDER
        self.print(f"{folder}: cannot be written: {error.strerror}; TensorBoard is off, log.jsonl has all numbers")
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Progress:
    """A counter of steps with a smoothed loss and the time that remains; made by :meth:`RunLog.progress`.

    The first step is counted but not measured: it starts workers and compiles.

    Attributes:
        is_first: whether no step was done yet.
    """

    def __init__(self, bar: tqdm | None):
        self._bar = bar
        self._loss = EMA(SMOOTHING)
        self.is_first = True
        self._last_step = time.monotonic()

    @property
    def loss(self) -> float | None:
        """Mean of the losses so far, in which the newer ones weigh more."""
        return self._loss() if self._loss.calls else None

    def advance(self, count: int = 1, *, loss: float | Tensor | None = None, **metrics: float) -> None:
        """Count steps.

        Args:
            count: steps done since the last call.
            loss: of these steps, also as a tensor of one element; shown smoothed, non-finite ones are left out.
            metrics: shown as they are.
        """
        bar = self._bar
        if bar is None:
            return
        if loss is not None and math.isfinite(loss):
            self._loss(float(loss))
        shown = metrics if self.loss is None else {"loss": self.loss} | metrics
        bar.set_postfix_str(_shown(shown), refresh=False)
        if self.is_first:
            self.is_first = False
            bar.n += count
            bar.initial = bar.last_print_n = bar.n
            self.restart_clock()
        else:
            bar.update(count)
            self._last_step = time.monotonic()

    def restart_clock(self) -> float:
        """Leave the time since the last step (an evaluation, a checkpoint) out of the speed; returns perf_counter()."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.start_t += now - self._last_step
            self._bar.last_print_t += now - self._last_step
        self._last_step = now
        return time.perf_counter()

    def line(self, title: str, **metrics: float) -> str:
        """The state as one line of text, with other metrics; empty in a process that is not the main one."""
        if self._bar is None:
            return ""
        changes = {"bar_format": LINE, "prefix": title, "postfix": _shown(metrics)}
        return " ".join(tqdm.format_meter(**self._bar.format_dict | changes).split())

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def read_log(path: str | os.PathLike) -> list[dict]:
    """Lines of a ``log.jsonl``. A last line without its end, of a run that was killed while writing, is left out.

    Raises:
        LogError: no such file, or a line that is no JSON object with a step.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LogError(f"{path}: the log cannot be read: {error.strerror}") from error
    lines = []
    # What follows the last line end is empty or torn.
    for number, text_line in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = json.loads(text_line)
            int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise LogError(f"{path}: line {number} is no record of a log: {text_line[:60]!r}") from error
        lines.append(line)
    return lines


def _set_aside(path: Path) -> None:
    """Rename the log of an earlier run to the first free number."""
    if not path.exists():
        return
    number = 1
    while (older := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(older)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, at once for all."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    with atomic_path(path) as part:
        part.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in kept), encoding="utf-8")


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _plain(value: Any) -> Any:
    """Tensors as numbers, paths as text, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"a log takes numbers, text and mappings of them, not {value!r}")


def _scalars(values: Values, prefix: str) -> Iterator[tuple[str, float]]:
    """Names and numbers of nested values; text and None are left out, non-finite numbers are not."""
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _scalars(value, name)
        elif isinstance(value, Tensor | np.generic):
            yield name, float(value.item())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
