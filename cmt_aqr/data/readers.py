"""Read sensor files, LiDAR .bin and camera JPEG; every fault of a file is an error of one sentence.

Names come from the tables, which keep them below the data root (`table_schema.FILE`). A symbolic link may point
outside it: data sets are often spread over several disks. Its target must be a regular file.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.data.index import CameraRecord, Frame
from cmt_aqr.data.jpeg import decode, find_damage, stated_size
from cmt_aqr.data.sample import DataError

# nuScenes LiDAR files: x, y, z, intensity, ring index, float32 each.
POINT_SIZE = 5
_COLUMNS = ("x", "y", "z", "intensity", "ring")
# In metres, and in the unit of the intensity: a larger number is damage, and would dominate everything else.
MAX_VALUE = 1e5


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would keep open() waiting


def _read_bytes(path: Path, kind: str) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{kind} file {path} is no regular file, expected one")
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{kind} file {path} is named in the tables but does not exist") from None
    except OSError as error:
        raise DataError(f"{kind} file {path} cannot be read: {error.strerror}") from None


def read_points(path: Path) -> Tensor:
    """Read one LiDAR sweep.

    Args:
        path: nuScenes .bin file with at least one point: a real sweep has tens of thousands, and an empty file is a
            failed copy. (In memory an empty point cloud is valid: no point may be in range.)

    Returns:
        (P, 5) float32: x, y, z in metres in the sensor's frame, intensity 0..255, ring index.

    Raises:
        DataError: a file that is missing, empty or not regular, a size that is not a multiple of one point, a value
            that is not finite or larger than `MAX_VALUE`.
    """
    data = _read_bytes(path, "LiDAR")
    point_bytes = POINT_SIZE * np.dtype(np.float32).itemsize
    if not data:
        raise DataError(f"LiDAR file {path} is empty: 0 bytes, expected at least the {point_bytes} of one point")
    if len(data) % point_bytes:
        raise DataError(
            f"LiDAR file {path} is truncated: {len(data)} bytes, expected a multiple of {point_bytes} (5 float32 each)"
        )
    points = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, POINT_SIZE)
    lowest, highest = torch.aminmax(points)
    if not (lowest >= -MAX_VALUE and highest <= MAX_VALUE):  # false for NaN, too
        row, column = (~(points.abs() <= MAX_VALUE)).nonzero()[0].tolist()
        value = points[row, column].item()
        raise DataError(
            f"LiDAR file {path}: point {row} has {_COLUMNS[column]} = {value:g}, expected a finite number of at most "
            f"{MAX_VALUE:.0f}"
        )
    return points


def remove_close(points: Tensor, radius: float) -> Tensor:
    """Points (P, 5) without those with both |x| and |y| below `radius` metres (returns from the own vehicle).

    *Source*: mmdet3d `LoadPointsFromMultiSweeps._remove_close`.
    """
    return points[(points[:, :2].abs() >= radius).any(dim=1)]


def read_sweeps(key_file: Path, sweeps: Sequence[tuple[Path, Tensor, float]], *, close_radius: float) -> Tensor:
    """Read a key frame and previous sweeps into the key frame's LiDAR frame.

    Args:
        key_file: LiDAR file of the key frame.
        sweeps: previous sweeps as (file, (4, 4) sweep -> key frame, time lag in seconds), most recent first.
        close_radius: sweep points closer than this in both |x| and |y| (sweep frame) are dropped; 0 keeps all. The key
            frame keeps all its points.

    Returns:
        (P, 5) float32 x, y, z, intensity, time lag; key frame first with lag 0.

    Raises:
        DataError: see :func:`read_points`.

    *Source*: mmdet3d `LoadPointsFromMultiSweeps` (it overwrites the ring index with the lag, too).
    """
    points = read_points(key_file)
    points[:, 4] = 0
    sweep_points = [points]
    for path, sweep2key, lag in sweeps:
        points = read_points(path)
        if close_radius > 0:
            points = remove_close(points, close_radius)
        place_sweep(points, sweep2key, lag)
        sweep_points.append(points)
    return torch.cat(sweep_points)


def place_sweep(points: Tensor, sweep2key: Tensor, lag: float) -> None:
    """Move points (P, 5) of a sweep into the key frame's LiDAR frame, in place; the fifth column becomes the time lag.

    Args:
        points: of the sweep.
        sweep2key: (4, 4) sweep -> key frame.
        lag: seconds before the key frame.
    """
    matrix = sweep2key.to(points.dtype)
    points[:, :3] = torch.addmm(matrix[:3, 3], points[:, :3], matrix[:3, :3].T)
    points[:, 4] = lag


def read_image(path: Path, *, size: tuple[int, int]) -> np.ndarray:
    """Read one camera image.

    Args:
        path: JPEG file.
        size: (height, width) that the tables state.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        DataError: missing, truncated or corrupt file, or another size than `size`.
    """
    data = _read_bytes(path, "image")
    if damage := find_damage(data):
        raise DataError(f"image file {path} {damage}")
    # Before decoding: a damaged header can ask for gigabytes.
    stated = stated_size(data)
    if stated is not None and sorted(stated) != sorted(size):  # sorted: the decoder may turn it upright
        raise _wrong_size(path, stated, size)
    image = decode(data)
    if image is None:
        raise DataError(
            f"image file {path} is corrupt: its {len(data)} bytes, starting {data[:4].hex(' ')}, are no JPEG"
        )
    if image.shape[:2] != tuple(size):
        raise _wrong_size(path, image.shape[:2], size)
    return image


def _wrong_size(path: Path, found: Sequence[int], size: tuple[int, int]) -> DataError:
    return DataError(
        f"image file {path} has {found[1]} x {found[0]} pixels, the sample_data table says {size[1]} x {size[0]}"
    )


def load_points(frame: Frame, dataroot: Path, *, num_sweeps: int, close_radius: float) -> Tensor:
    """Points of a key frame and of its most recent `num_sweeps` previous sweeps; see :func:`read_sweeps`."""
    sweeps = [
        (dataroot / sweep.file, torch.tensor(sweep.sweep2key, dtype=torch.float64), sweep.time_lag)
        for sweep in frame.sweeps[:num_sweeps]
    ]
    return read_sweeps(dataroot / frame.lidar_file, sweeps, close_radius=close_radius)


def image_size_of(frame: Frame) -> tuple[int, int]:
    """(height, width) on disk, which all views of a frame must share.

    Raises:
        DataError: when they do not.
    """
    sizes = {(camera.height, camera.width): camera.channel for camera in frame.cameras}
    if len(sizes) > 1:
        found = ", ".join(f"{channel} {width} x {height}" for (height, width), channel in sizes.items())
        raise DataError(f"sample {frame.token}: views have different image sizes in sample_data: {found}")
    return next(iter(sizes))


def read_views(frame: Frame, dataroot: Path) -> Iterator[np.ndarray]:
    """The views as on disk, (height, width, 3) uint8 RGB each, read lazily; a missing view is black."""
    for camera in frame.cameras:
        yield read_view(camera, dataroot)


def read_view(camera: CameraRecord, dataroot: Path) -> np.ndarray:
    """One view as on disk, (height, width, 3) uint8 RGB; black where the frame has no such image."""
    if camera.file is None:
        return np.zeros((camera.height, camera.width, 3), dtype=np.uint8)
    return read_image(dataroot / camera.file, size=(camera.height, camera.width))
