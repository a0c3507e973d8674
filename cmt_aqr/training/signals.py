"""Ctrl-C and the scheduler's SIGTERM: end the step, save, leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopFlag:
    """Set by the first SIGINT or SIGTERM; the loop then ends the step, saves and leaves."""

    is_set = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one kills as usual."""
    flag = StopFlag()
    previous = {}

    def handle(number, frame):
        flag.is_set = True
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
