"""One run per work dir."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmt_aqr.errors import UserError

LOCK_FILE = "run.lock"
# Error numbers of a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class WorkDirBusyError(UserError):
    """Another process trains in this work dir."""


@contextmanager
def work_dir_lock(work_dir: Path) -> Iterator[None]:
    """Hold the lock of a work dir, ``work_dir/run.lock``; it ends with this process, however that ends.

    A POSIX record lock is not inherited. flock(2), which the filelock package uses, would still be held by the data
    workers that outlive a killed run for some seconds, and a restart would find its own work dir locked.

    Raises:
        WorkDirBusyError: names the process that holds it.
        OSError: the file cannot be written.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / LOCK_FILE
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise WorkDirBusyError(_describe_holder(work_dir, file.read())) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            sys.stderr.write(f"warning: {path}: this file system has no locks; do not start a second run here\n")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _describe_holder(work_dir: Path, text: str) -> str:
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']} has been training here since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it holds the lock but has not written its name yet
        who = "another process has just started to train here"
    return f"--work-dir {work_dir}: {who}; stop it or name another folder with --work-dir"
