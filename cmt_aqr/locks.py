"""Locks between processes: one writes, the others know which process they wait for."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


@contextmanager
def exclusive_lock(lock: Path, *, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock while the block runs. The system releases it when its holder ends, however it ends.

    Args:
        lock: a file that holds the holder's name, such as "process 17 on host7"; made now, removed in the end. Its
            folder must exist.
        on_wait: called once with the holder's name when another process holds the lock, which is then waited for;
            may raise, and so give up.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    file = _acquire(lock, on_wait)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock goes: who waits for this file notices and opens the next one
        file.close()


def _acquire(lock: Path, on_wait: Callable[[str], None]) -> FileIO:
    has_said = False
    while True:
        file = open(lock, "a+b", buffering=0)  # noqa: SIM115 (stays open as long as the lock is held)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not has_said:
                    file.seek(0)
                    on_wait(file.read().decode(errors="replace") or "another process")
                    has_said = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether an open file is still what its name leads to."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
