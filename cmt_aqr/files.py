"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block succeeds, what is there is renamed onto `path`.

    So `path` is at all times the old file or the whole new one (a folder can only be new). A block that fails leaves
    nothing behind; what a killed process left is removed by the next, so only one process may write at a time.

    Args:
        path: a file or a folder; its parent is made.

    Raises:
        OSError: the disk is full, a permission is missing and the like; the caller turns it into a sentence.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            # Else the new name could reach the disk before the content does.
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """`path.write_bytes(data)`, whose OSError names the file also when the disk is full."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
