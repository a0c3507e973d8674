"""Ctrl-C and the scheduler's SIGTERM: finish the step, save, exit."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Whether SIGINT or SIGTERM has come. A signal raises KeyboardInterrupt at once, except in :meth:`deferred`."""

    def __init__(self) -> None:
        self.is_set = False
        self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal only sets the flag, so that the block always runs to its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside the block a signal raises KeyboardInterrupt at once, and so does one that came before."""
        deferred, self._is_deferred = self._is_deferred, False
        try:
            if self.is_set:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_deferred = deferred

    def receive(self) -> None:
        """Set the flag."""
        self.is_set = True
        if not self._is_deferred:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Let the first SIGINT or SIGTERM stop the block in an orderly way; a second one kills the process at once."""
    flag = StopFlag()

    def handle(number, frame):
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        flag.receive()

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
