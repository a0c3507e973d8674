"""Progress of long tasks: a bar on a terminal, elsewhere a line now and then; tqdm measures the time.

Only the main process of a run writes, and nothing is written about what takes less than PATIENCE.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

# Seconds that a task may take silently.
PATIENCE = 3.0
# Seconds between two lines where stderr is no terminal.
PLAIN_PERIOD = 15.0
LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.1f} %){postfix}, {rate_fmt}, remaining {remaining}"

Item = TypeVar("Item")


def write_line(text: str) -> None:
    """Write a line to stderr, without tearing a bar, in the main process."""
    if _is_main_process():
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Where the block takes longer than PATIENCE, print what is being done, and at the end how long it took.

    Args:
        text: such as "loading the tables of data/nuscenes".
    """
    started = time.monotonic()
    timer = threading.Timer(PATIENCE, write_line, (f"{text} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.monotonic() - started
    if seconds >= PATIENCE:
        write_line(f"{text}: done in {tqdm.format_interval(seconds)}")


def counted(items: Iterable[Item], title: str, *, total: int, unit: str) -> Iterator[Item]:
    """The items, while a bar or lines on stderr show how many of them are done."""
    with make_bar(title, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def make_bar(
    title: str,
    total: int,
    unit: str,
    *,
    done: int = 0,
    smoothing: float = 0.3,
    is_shown: bool = True,
    write: Callable[[str], None] = write_line,
    period: float = PLAIN_PERIOD,
) -> tqdm:
    """A bar on stderr where that is a terminal, else lines; it appears after PATIENCE.

    Args:
        title: of what is counted.
        total: of the whole.
        unit: one of what is counted.
        done: before.
        smoothing: share of the newest measurement in the rate, on a terminal ten a second.
        is_shown: False counts silently.
        write: takes the lines.
        period: seconds between two lines.
    """
    common = {"desc": title, "total": total, "initial": done, "unit": unit, "leave": False}
    if not (is_shown and _is_main_process()):
        return tqdm(**common, disable=True)
    if sys.stderr.isatty():
        return tqdm(**common, delay=PATIENCE, dynamic_ncols=True, smoothing=smoothing)
    lines = _Lines(write, period)
    # One position for all: there is nothing to move between.
    lines.bar = tqdm(
        **common, file=lines, delay=PATIENCE, mininterval=PATIENCE, miniters=1, position=0, bar_format=LINE
    )
    return lines.bar


class _Lines:
    """A file for tqdm, which writes every state as a line that begins with a carriage return."""

    def __init__(self, write: Callable[[str], None], period: float):
        self.bar: tqdm | None = None
        self._write = write
        self._period = period

    def write(self, text: str) -> None:
        line = " ".join(text.split())
        if line:
            self._write(line)
            self.bar.mininterval = self._period

    def flush(self) -> None:
        """Lines are written at once."""


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
