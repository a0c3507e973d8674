"""What a user passes to a :class:`cmt_aqr.predictor.Predictor`: checked, every mistake in one sentence."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cmt_aqr.classes import CAMERAS
from cmt_aqr.errors import UserError

# Seconds; sweeps are at most half a second old in nuScenes, and ring indices of any LiDAR go further.
MAX_LAG = 5.0
# Whole numbers with at least so many different values are ring indices, not seconds.
RING_VALUES = 4
# Metres, and whatever the intensity's unit is.
MAX_VALUE = 1e5
# A projection whose 3 x 3 part has a smaller determinant, relative to its rows' lengths, is singular.
MIN_DETERMINANT = 1e-9
Views = list[np.ndarray | None]


class InputError(UserError):
    """Arrays that the predictor cannot use."""


def check_images(images: Sequence[ArrayLike | Tensor | None] | ArrayLike | None, where: str) -> Views | None:
    """Views as (H, W, 3) uint8 arrays in the order of ``CAMERAS``, None for a missing one; None where all are missing.

    Args:
        images: a list of views, or one array (6, H, W, 3).
        where: begins every sentence where there are several frames; empty for one.

    Raises:
        InputError: another number of views, channels first, a dtype other than uint8, a view on another device.
    """
    if images is None:
        return None
    if isinstance(images, np.ndarray | Tensor) and images.ndim != 4:
        raise InputError(
            f"{where}images has shape {tuple(images.shape)}; expected a list of {len(CAMERAS)} views (H, W, 3), "
            f"or one array ({len(CAMERAS)}, H, W, 3)"
        )
    if len(images) != len(CAMERAS):
        raise InputError(
            f"{where}images holds {len(images)} views; expected {len(CAMERAS)} in the order {', '.join(CAMERAS)}, with "
            "None for a camera that is missing"
        )
    views = [None if view is None else _check_view(view, f"{where}images[{i}]") for i, view in enumerate(images)]
    return None if all(view is None for view in views) else views


def _check_view(view: ArrayLike | Tensor, name: str) -> np.ndarray:
    if isinstance(view, Tensor):
        if view.device.type != "cpu":
            raise InputError(f"{name} is on {view.device}; expected the CPU, where images are resized: use .cpu()")
        view = view.numpy()
    view = np.asarray(view)
    if view.ndim == 3 and view.shape[0] == 3 and view.shape[2] != 3:
        raise InputError(
            f"{name} has shape {view.shape}, channels first; expected (H, W, 3): use .transpose(1, 2, 0), or "
            ".permute(1, 2, 0) of a tensor"
        )
    if view.ndim != 3 or view.shape[2] != 3 or 0 in view.shape:
        raise InputError(f"{name} has shape {view.shape}; expected (H, W, 3) with the channels R, G, B")
    if view.dtype != np.uint8:
        scale = " and goes from 0 to 1: multiply it by 255 and" if _is_unit_range(view) else ":"
        raise InputError(f"{name} has dtype {view.dtype}{scale} convert it to uint8, expected numbers from 0 to 255")
    return view


def _is_unit_range(view: np.ndarray) -> bool:
    return np.issubdtype(view.dtype, np.floating) and view.size > 0 and view.min() >= 0 and view.max() <= 1


def check_points(points: ArrayLike | Tensor | None, device: torch.device, where: str) -> Tensor | None:
    """Points (P, 5) float32: x, y, z, intensity, seconds before now, which is 0 where (P, 4) are given.

    Args:
        device: of the predictor; points may lie there, too.
        where: as in :func:`check_images`.

    Raises:
        InputError: another shape, a number that is not finite, a ring index instead of the time, another device.
    """
    if points is None:
        return None
    if isinstance(points, Tensor) and points.device.type != "cpu" and points.device != device:
        raise InputError(f"{where}points are on {points.device}, the predictor is on {device}: use .to({device})")
    try:
        cloud = torch.as_tensor(points).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}points are no array of numbers: {error}") from None
    if cloud.ndim != 2 or cloud.shape[1] not in (4, 5):
        hint = "; put 0 where the intensity is unknown" if cloud.ndim == 2 and cloud.shape[1] == 3 else ""
        raise InputError(
            f"{where}points has shape {tuple(cloud.shape)}; expected (P, 4) x, y, z, intensity or (P, 5) with the "
            f"seconds before now{hint}"
        )
    is_bad = ~(cloud.abs() <= MAX_VALUE)  # true for NaN
    if is_bad.any():
        row, column = is_bad.nonzero()[0].tolist()
        raise InputError(
            f"{where}points[{row}, {column}] is {cloud[row, column].item():g}; expected a finite number of at most "
            f"{MAX_VALUE:.0f}: leave such points out"
        )
    if cloud.shape[1] == 4:
        return torch.cat((cloud, cloud.new_zeros(len(cloud), 1)), dim=1)
    _check_times(cloud[:, 4], where)
    return cloud


def _check_times(times: Tensor, where: str) -> None:
    if not len(times):
        return
    low, high = times.min().item(), times.max().item()
    is_ring = bool((times == times.round()).all()) and len(times.unique()) >= RING_VALUES
    if low < 0 or high > MAX_LAG or is_ring:
        looks = "whole numbers, which look like ring indices" if is_ring else "which are no ages of sweeps"
        raise InputError(
            f"{where}points[:, 4] goes from {low:g} to {high:g}, {looks}; expected seconds before now, 0 to about 0.5: "
            "put 0 there for a single sweep, or give points (P, 4)"
        )


def check_calibration(lidar2img: ArrayLike | Tensor | None, where: str) -> np.ndarray | None:
    """Projections (6, 4, 4) float64.

    Raises:
        InputError: another shape, a number that is not finite, a matrix without inverse, another last row.
    """
    if lidar2img is None:
        return None
    if isinstance(lidar2img, Sequence):
        lidar2img = [m.detach().cpu().numpy() if isinstance(m, Tensor) else m for m in lidar2img]
    elif isinstance(lidar2img, Tensor):
        lidar2img = lidar2img.detach().cpu().numpy()
    try:
        matrices = np.asarray(lidar2img, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}lidar2img is no array of numbers ({len(CAMERAS)}, 4, 4)") from None
    if matrices.shape != (len(CAMERAS), 4, 4):
        hint = ": add the row 0 0 0 1 to every matrix" if matrices.shape[-2:] == (3, 4) else ""
        raise InputError(
            f"{where}lidar2img has shape {matrices.shape}; expected ({len(CAMERAS)}, 4, 4), LiDAR frame to pixels of "
            f"each image{hint}"
        )
    for i, matrix in enumerate(matrices):
        if not np.isfinite(matrix).all():
            raise InputError(f"{where}lidar2img[{i}] holds numbers that are not finite")
        lengths = np.linalg.norm(matrix[:3, :3], axis=1)
        if not lengths.all() or abs(np.linalg.det(matrix[:3, :3] / lengths[:, None])) < MIN_DETERMINANT:
            raise InputError(f"{where}lidar2img[{i}] is singular; expected intrinsics (4, 4) @ LiDAR to camera (4, 4)")
        if not np.allclose(matrix[3], (0, 0, 0, 1)):
            shown = ", ".join(f"{value:g}" for value in matrix[3])
            raise InputError(f"{where}lidar2img[{i}] ends with the row {shown}; expected 0, 0, 0, 1: is it transposed?")
    return matrices
