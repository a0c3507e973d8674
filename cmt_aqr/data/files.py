"""Sensor files: LiDAR .bin and camera JPEG into tensors, with every way a file can be wrong said in one sentence."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.data.index import Frame
from cmt_aqr.data.jpeg import decode, find_damage
from cmt_aqr.data.sample import DataError

# nuScenes LiDAR files: x, y, z, intensity, ring index, float32 each.
POINT_SIZE = 5
_COLUMNS = ("x", "y", "z", "intensity", "ring")


def _read_bytes(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{kind} file {path} is named in the tables but does not exist") from None
    except OSError as error:
        raise DataError(f"{kind} file {path} cannot be read: {error.strerror}") from None


def read_points(path: Path) -> Tensor:
    """Read one LiDAR sweep.

    Args:
        path: nuScenes .bin file; an empty file is an empty sweep.

    Returns:
        (P, 5) float32: x, y, z in metres in the sensor's frame, intensity 0..255, ring index.

    Raises:
        DataError: missing file, size that is no multiple of one point, NaN or infinite value.
    """
    data = _read_bytes(path, "LiDAR")
    point_bytes = POINT_SIZE * np.dtype(np.float32).itemsize
    if len(data) % point_bytes:
        raise DataError(
            f"LiDAR file {path} is truncated: {len(data)} bytes, expected a multiple of {point_bytes} (5 float32 each)"
        )
    if not data:
        return torch.empty(0, POINT_SIZE)
    points = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, POINT_SIZE)
    if not torch.isfinite(points.sum()):
        bad = (~torch.isfinite(points)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            value = points[row, column].item()
            raise DataError(
                f"LiDAR file {path}: point {row} has {_COLUMNS[column]} = {value}, expected a finite number"
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
    clouds = [points]
    for path, sweep2key, lag in sweeps:
        points = read_points(path)
        if close_radius > 0:
            points = remove_close(points, close_radius)
        matrix = sweep2key.to(points.dtype)
        points[:, :3] = torch.addmm(matrix[:3, 3], points[:, :3], matrix[:3, :3].T)
        points[:, 4] = lag
        clouds.append(points)
    return torch.cat(clouds)


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
    image = decode(data)
    if image is None:
        raise DataError(
            f"image file {path} is corrupt: its {len(data)} bytes, starting {data[:4].hex(' ')}, are no JPEG"
        )
    if image.shape[:2] != tuple(size):
        found = f"{image.shape[1]} x {image.shape[0]}"
        raise DataError(f"image file {path} has {found} pixels, the sample_data table says {size[1]} x {size[0]}")
    return image


def load_points(frame: Frame, dataroot: Path, *, num_clouds: int, close_radius: float) -> Tensor:
    """The frame's key cloud and its most recent `num_clouds` - 1 sweeps; see :func:`read_sweeps`."""
    sweeps = [
        (dataroot / sweep.file, torch.tensor(sweep.sweep2key, dtype=torch.float64), sweep.time_lag)
        for sweep in frame.sweeps[: num_clouds - 1]
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
    """The views as on disk, (height, width, 3) uint8 RGB each, read as they are asked for; a missing view is black."""
    for camera in frame.cameras:
        if camera.file is None:
            yield np.zeros((camera.height, camera.width, 3), dtype=np.uint8)
        else:
            yield read_image(dataroot / camera.file, size=(camera.height, camera.width))
