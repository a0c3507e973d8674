"""Cache files that several processes may need at once: a lock, atomic replacement, fingerprints of the inputs."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cmt_aqr import locks
from cmt_aqr.data.sample import DataError
from cmt_aqr.files import atomic_path

logger = logging.getLogger(__name__)

_HASH_BLOCK = 1 << 22


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock while the block runs; other processes log that they wait. It is freed when its process ends.

    Raises:
        DataError: the folder cannot be written, or its file system has no locks.
    """

    def log_wait(holder: str) -> None:
        logger.warning("%s is being written by %s: waiting for it", path, holder)

    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.exclusive_lock(path.with_name(path.name + ".lock"), on_wait=log_wait))
        except OSError as error:
            raise DataError(
                f"cache folder {path.parent} cannot be written: {error.strerror}; name another with data.index_dir"
            ) from None
        yield


@contextmanager
def new_cache(path: Path) -> Iterator[Path]:
    """`files.atomic_path` for a cache file or folder.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(
            f"{path}: the cache cannot be written: {error.strerror}; name another folder with data.index_dir"
        ) from None


def fingerprint(files: Mapping[str, Path], previous: Mapping[str, Sequence] | None = None) -> dict[str, list]:
    """Size, modification time (ns) and SHA-256 of every file.

    Args:
        files: name -> path; all must exist.
        previous: an earlier fingerprint; a file whose size and time are unchanged keeps its hash without being read.

    Returns:
        name -> [size, mtime_ns, hex digest].
    """
    result = {}
    for name, path in files.items():
        stat = path.stat()
        known = (previous or {}).get(name)
        if known and list(known[:2]) == [stat.st_size, stat.st_mtime_ns]:
            result[name] = list(known)
        else:
            result[name] = [stat.st_size, stat.st_mtime_ns, _sha256(path)]
    return result


def same_content(a: Mapping[str, Sequence], b: Mapping[str, Sequence]) -> bool:
    """Whether two fingerprints name the same files with the same content (time stamps may differ)."""
    return a.keys() == b.keys() and all(a[name][2] == b[name][2] for name in a)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
