"""Build an object database from the frames of a split: prints how large it will be, and continues after a stop.

The files grow in a folder of their own, which is renamed when they are complete. `objects.npz` describes the objects of
the first frames and is replaced atomically every SAVED_EVERY frames, after the bytes that it describes are on the disk.
Bytes after those in `points.bin` and `patches.bin` belong to later frames: a build that continues removes them and
reads those frames again.
"""

import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from cmt_aqr.classes import CLASSES
from cmt_aqr.data.loader import explain_killed_worker, start_worker
from cmt_aqr.data.sample import DataError
from cmt_aqr.files import atomic_path
from cmt_aqr.progress import make_bar, phase, write_line

# Frames between two saved states from which a build can continue.
SAVED_EVERY = 500
# The size is printed for splits of at least this many frames, estimated from this many of them.
LARGE, NUM_PROBED = 100, 16
# The growing files, as GtDatabase reads them: float32 rows, and JPEGs.
DATA_FILES = ("points.bin", "patches.bin")

# One object: label, box (9,) float32, points (P, 5) float32, JPEG or nothing. Arrays, not tensors: a worker process
# would send every tensor through a file descriptor of its own, and a frame has a hundred of them.
FrameObject = tuple[int, np.ndarray, np.ndarray, bytes]


@dataclass
class _Contents:
    """What `objects.npz` holds: the objects of the first `num_frames` frames, with the length of each file so far."""

    num_frames: int = 0
    labels: list[int] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)
    point_ends: list[int] = field(default_factory=lambda: [0])  # in points
    patch_ends: list[int] = field(default_factory=lambda: [0])  # in bytes
    sizes: list[int] = field(default_factory=lambda: [0] * len(DATA_FILES))  # bytes

    def add(self, frame: Sequence[FrameObject], files: Sequence[BinaryIO]) -> None:
        """Write the objects of the next frame."""
        for label, box, points, patch in frame:
            self.labels.append(label)
            self.boxes.append(box)
            self.point_ends.append(self.point_ends[-1] + len(points))
            self.patch_ends.append(self.patch_ends[-1] + len(patch))
            for i, data in enumerate((points.tobytes(), patch)):
                self.sizes[i] += files[i].write(data)
        self.num_frames += 1

    def save(self, folder: Path, files: Sequence[BinaryIO]) -> None:
        """Write the objects so far to the disk, where they survive a crash of the process or the machine."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        with atomic_path(folder / "objects.npz") as path, open(path, "wb") as file:
            np.savez(
                file,
                num_frames=self.num_frames,
                sizes=self.sizes,
                labels=np.array(self.labels, dtype=np.int64),
                boxes=np.array(self.boxes, dtype=np.float32).reshape(-1, 9),
                point_offsets=np.array(self.point_ends, dtype=np.int64),
                patch_offsets=np.array(self.patch_ends, dtype=np.int64),
            )


def write_database(frames: Dataset, folder: Path, num_workers: int) -> None:
    """Write the objects of all frames to `folder`, which appears when it is complete.

    Only one process may write at a time. A build that an earlier call left in `folder`.unfinished is continued; the
    frames must be the same.

    Args:
        frames: has a length; yields a frame's objects as a list of `FrameObject`, or a DataError.
        folder: new.
        num_workers: processes that read frames.

    Raises:
        DataError: of a frame; a killed worker; the disk is full or cannot be written. The frames before are kept.
    """
    growing = folder.with_name(f"{folder.name}.unfinished")
    try:
        growing.mkdir(parents=True, exist_ok=True)
        contents = _load(growing)
        _describe(frames, contents, growing)
        _append(frames, contents, growing, num_workers)
        growing.rename(folder)
    except BaseException as error:
        kept = _load(growing).num_frames
        if not kept:
            shutil.rmtree(growing, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        rest = f"{kept} of {len(frames)} frames are kept, and the next start continues after them"
        raise DataError(
            f"{folder}: the object database cannot be written: {error.strerror}; {rest if kept else 'nothing is kept'}"
        ) from None
    if len(frames) >= LARGE:
        counts = np.bincount(contents.labels, minlength=len(CLASSES))
        write_line(
            f"object database {folder}: {', '.join(f'{name} {n}' for name, n in zip(CLASSES, counts, strict=True))}"
        )


def estimate_size(frames: Dataset) -> float:
    """Bytes of the objects of all frames, estimated from a few frames spread over them; broken ones count as empty."""
    count = min(NUM_PROBED, len(frames))
    probed = [frames[(2 * i + 1) * len(frames) // (2 * count)] for i in range(count)]
    objects = [one for frame in probed if not isinstance(frame, DataError) for one in frame]
    return len(frames) / count * sum(points.nbytes + len(patch) for _, _, points, patch in objects)


def _load(growing: Path) -> _Contents:
    """The contents that an interrupted build left; empty where they are damaged."""
    try:
        with np.load(growing / "objects.npz", allow_pickle=False) as arrays:
            contents = _Contents(
                num_frames=int(arrays["num_frames"]),
                labels=arrays["labels"].tolist(),
                boxes=list(arrays["boxes"]),
                point_ends=arrays["point_offsets"].tolist(),
                patch_ends=arrays["patch_offsets"].tolist(),
                sizes=arrays["sizes"].tolist(),
            )
        is_whole = all(
            (growing / name).stat().st_size >= size for name, size in zip(DATA_FILES, contents.sizes, strict=True)
        )
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
        is_whole = False
    return contents if is_whole else _Contents()


def _describe(frames: Dataset, contents: _Contents, growing: Path) -> None:
    """Print how large the database will be, unless it is small."""
    done, total = contents.num_frames, len(frames)
    if total < LARGE:
        return
    if done:
        rest = sum(contents.sizes) * (total - done) / done
        text = (
            f"the object database in {growing} continues after frame {done} of {total}, about {rest / 1e9:.1f} GB more"
        )
    else:
        with phase(f"estimating the size of the object database from {NUM_PROBED} frames"):
            rest = estimate_size(frames)
        text = f"cutting the object database out of {total} frames into {growing}, about {rest / 1e9:.1f} GB"
    free = shutil.disk_usage(growing).free
    write_line(f"{text}; {free / 1e9:.1f} GB are free there{', which may not be enough' if rest > free else ''}")


def _append(frames: Dataset, contents: _Contents, growing: Path, num_workers: int) -> None:
    """Add the frames that are missing."""
    total = len(frames)
    rest = Subset(frames, range(contents.num_frames, total))
    loader = DataLoader(
        rest, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, worker_init_fn=start_worker
    )
    advice = "free some memory; the next start continues the object database where it stopped"
    with ExitStack() as stack:
        files = [
            stack.enter_context(_open_at(growing / name, size))
            for name, size in zip(DATA_FILES, contents.sizes, strict=True)
        ]
        bar = stack.enter_context(make_bar("object database", total, "frame", done=contents.num_frames))
        stack.enter_context(explain_killed_worker(advice))
        for objects in loader:
            if isinstance(objects, DataError):
                raise DataError(str(objects))
            contents.add(objects, files)
            if contents.num_frames % SAVED_EVERY == 0:
                contents.save(growing, files)
            bar.update()
        contents.save(growing, files)


def _as_it_is(frame: list[FrameObject] | DataError) -> list[FrameObject] | DataError:
    return frame  # PyTorch's own choice would make tensors of the arrays


def _open_at(path: Path, size: int) -> BinaryIO:
    """A file to append to, cut to its first `size` bytes."""
    file = open(path, "ab")  # noqa: SIM115 (its caller closes it)
    file.truncate(size)
    return file
