"""python -m tests.e2e.faults.sensor_files: random damages of LiDAR and JPEG files, through the samples.

Every damage must be refused with one sentence that names the file, or leave a valid sample: sizes as the tables say,
finite points. Damage number i depends on the seed and i alone.
"""

import argparse
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import MAX_VALUE
from cmt_aqr.data.sample import Sample
from cmt_aqr.synthetic import WorldSettings, generate_world
from tests.e2e.faults.outcomes import Outcome, observe, report

IMAGE_SIZE = (256, 144)
FINAL_SIZE = (128, 256)
LIMIT = 20.0


@dataclass(frozen=True)
class Base:
    """A whole world whose first frame is damaged, and what that gives undamaged."""

    index: FrameIndex
    sample: Sample


def make_base(folder: Path) -> Base:
    """Write the world and read its first frame."""
    root = folder / "world"
    settings = WorldSettings(
        scenes=1, val_scenes=0, seed=6, samples_per_scene=1, image_size=IMAGE_SIZE, sweeps_per_keyframe=0,
        lidar_columns=180,
    )  # fmt: skip
    generate_world(root, settings, progress=False)
    index = load_index(dataroot=root, version="v1.0-synthetic", split="synthetic_train", cache_dir=folder / "cache")
    return Base(index, _read(index))


def run(base: Base, *, count: int, seed: int, first: int = 0) -> list[Outcome]:
    """Damages number first ... first + count - 1."""
    return [_try_damage(base, random.Random(f"{seed}/{number}")) for number in range(first, first + count)]


def _try_damage(base: Base, rng: random.Random) -> Outcome:
    frame = base.index.frame(0)
    kind, damage = rng.choice(DAMAGES)
    cameras = [camera.file for camera in frame.cameras]
    file = frame.lidar_file if kind.startswith("LiDAR") or rng.random() < 0.5 else rng.choice(cameras)
    file = rng.choice(cameras) if kind.startswith("JPEG") else file
    path = base.index.dataroot / file
    other = base.index.dataroot / (rng.choice(cameras) if file == frame.lidar_file else frame.lidar_file)
    data = path.read_bytes()
    path.unlink()
    try:
        damage(rng, path, data, other)
        result, text = observe(lambda: _is_identical(base), named=[str(path)], limit=LIMIT)
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(data)
    return Outcome(kind, file, result, text)


def _read(index: FrameIndex) -> Sample:
    return FrameDataset(index, final_size=FINAL_SIZE, num_sweeps=0)[0]


def _is_identical(base: Base) -> bool:
    sample = _read(base.index)
    assert sample.images.shape == base.sample.images.shape and sample.images.dtype == torch.uint8
    assert sample.points.ndim == 2 and sample.points.shape[1] == 5 and len(sample.points) > 0
    assert sample.points.abs().max() <= MAX_VALUE  # false for NaN
    return torch.equal(sample.images, base.sample.images) and torch.equal(sample.points, base.sample.points)


def _writes(change: Callable[[random.Random, bytearray], bytes]) -> Callable:
    def damage(rng: random.Random, path: Path, data: bytes, other: Path) -> None:
        path.write_bytes(change(rng, bytearray(data)))

    return damage


def _flipped(rng: random.Random, data: bytearray, end: int | None = None) -> bytes:
    for _ in range(rng.choice((1, 10, 300))):
        data[rng.randrange(min(len(data), end or len(data)))] ^= 1 << rng.randrange(8)
    return data


def _zeroed(rng: random.Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((512, 4096)))
    data[start:stop] = bytes(stop - start)
    return data


def _with_value(rng: random.Random, data: bytearray) -> bytes:
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 1e30, -3e38))
    struct.pack_into("<f", data, 4 * rng.randrange(len(data) // 4), value)
    return data


def _without_piece(rng: random.Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 2000)]
    return data


def _no_regular_file(rng: random.Random, path: Path, data: bytes, other: Path) -> None:
    rng.choice((
        lambda: path.mkdir(), lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: None,
        lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("/dev/null"), lambda: path.symlink_to("none"),
    ))()  # fmt: skip


def _other_type(rng: random.Random, path: Path, data: bytes, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _other_size(rng: random.Random, path: Path, data: bytes, other: Path) -> None:
    size = rng.choice(((1, 1), (IMAGE_SIZE[0], IMAGE_SIZE[1]), (2 * IMAGE_SIZE[1], 2 * IMAGE_SIZE[0]), (40, 4000)))
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))


DAMAGES = [
    ("any: cut short", _writes(lambda rng, data: data[: rng.randrange(len(data))])),
    ("any: a piece missing", _writes(_without_piece)),
    ("any: bits flipped", _writes(_flipped)),
    ("any: a block of zeros", _writes(_zeroed)),
    ("any: zero bytes long", _writes(lambda rng, data: b"")),
    ("any: random bytes", _writes(lambda rng, data: rng.randbytes(len(data)))),
    ("any: file of the other sensor", _other_type),
    ("any: a folder, a pipe, a device, nothing", _no_regular_file),
    ("any: something after the end", _writes(lambda rng, data: data + rng.randbytes(rng.randrange(1, 4000)))),
    ("LiDAR: NaN, infinite or huge", _writes(_with_value)),
    ("JPEG: bits flipped in the header", _writes(lambda rng, data: _flipped(rng, data, 600))),
    ("JPEG: another size", _other_size),
]


def main() -> int:
    """Run the command line; exit status 1 when a damage led to a traceback, a hang or a bad sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first damage, to repeat one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        outcomes = run(base, count=options.count, seed=options.seed, first=options.first)
        return report(outcomes, Path(folder), first=options.first)


if __name__ == "__main__":
    sys.exit(main())
