"""Pure geometry: point range <-> unit cube, projection, rigid transforms.

Frames: LiDAR frame (x right, y forward, z up, metres); pixels of the network's input image (u right, v down).
Everything here is a free function of tensors, works in float32 and float64 and on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Keeps the inverse sigmoid finite; the original clamps with the same value (`mmdet.models.utils.transformer`).
INVERSE_SIGMOID_EPS = 1e-5
# Added to the depth before the perspective division, with the sign of the depth (Quirk Q6).
DEPTH_EPS = 1e-6


def constant_like(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers as a tensor (N,) with the dtype and device of ``like``, without waiting for the GPU.

    ``like.new_tensor(values)`` gives the same tensor but stalls until the GPU has caught up. In a compiled graph the
    numbers are constants; a copy that does not block could there begin after its source has been used again.
    """
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=not torch.compiler.is_compiling())


def to_metres(points: Tensor, point_range: Sequence[float]) -> Tensor:
    """Unit cube -> LiDAR frame.

    Args:
        points: (..., 3), in [0, 1] inside the range.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.

    Returns:
        (..., 3) metres, same dtype.
    """
    low, high = constant_like(point_range, points).chunk(2)
    return points * (high - low) + low


def to_unit(points: Tensor, point_range: Sequence[float]) -> Tensor:
    """LiDAR frame (..., 3) in metres -> unit cube (..., 3); the inverse of :func:`to_metres`."""
    low, high = constant_like(point_range, points).chunk(2)
    return (points - low) / (high - low)


def inverse_sigmoid(x: Tensor, eps: float = INVERSE_SIGMOID_EPS) -> Tensor:
    """log(x / (1 - x)) with x and 1 - x clamped from below to ``eps``; any shape, x in [0, 1]."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def homogeneous(points: Tensor) -> Tensor:
    """(..., 3) -> (..., 4) with a trailing one."""
    return torch.cat((points, torch.ones_like(points[..., :1])), dim=-1)


def transform_points(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply a 4 x 4 rigid or affine transform.

    Args:
        matrix: (..., 4, 4), p_b = matrix @ [p_a, 1].
        points: (..., P, 3), leading dimensions broadcast with those of ``matrix``.

    Returns:
        (..., P, 3).
    """
    return points @ matrix[..., :3, :3].transpose(-1, -2) + matrix[..., None, :3, 3]


def project(points: Tensor, lidar2img: Tensor) -> tuple[Tensor, Tensor]:
    """Project LiDAR-frame points into every view, without judging visibility.

    Args:
        points: (B, Q, 3) metres.
        lidar2img: (B, V, 4, 4), [u*d, v*d, d, 1] = lidar2img @ [x, y, z, 1], pixels of the network's input.

    Returns:
        scaled (B, V, Q, 2): u*d and v*d in pixels x metres; depth (B, V, Q) in metres. The caller divides, because how
        the original guards the division differs between its query embedding (Q6) and its windows (Q11).
    """
    camera = transform_points(lidar2img, points[:, None])
    return camera[..., :2], camera[..., 2]
