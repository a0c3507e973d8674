"""Calibration of the cameras of a batch, as positions, queries and windows read it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """Calibration of a batch.

    Attributes:
        lidar2img: (B, V, 4, 4) float64, LiDAR frame -> (u*d, v*d, d, 1), pixels of the network's input.
        img2lidar: (B, V, 4, 4), its inverse, computed in float64, in the dtype of the model.
        image_size: (height, width) of the network's input in pixels, padding included.
    """

    lidar2img: Tensor
    img2lidar: Tensor
    image_size: tuple[int, int]


def make_cameras(lidar2img: Tensor, image_size: tuple[int, int], *, dtype: torch.dtype) -> Cameras:
    """Invert the calibration in float64, then convert the inverse to ``dtype``.

    A singular matrix gives non-finite values instead of an error, because asking would stall the GPU; the data side
    refuses such calibration.

    Args:
        lidar2img: (B, V, 4, 4) float64.
        image_size: (height, width) in pixels.
    """
    if lidar2img.ndim != 4 or lidar2img.shape[-2:] != (4, 4):
        raise ValueError(f"lidar2img must have shape (B, V, 4, 4), got {tuple(lidar2img.shape)}")
    inverse = torch.linalg.inv_ex(lidar2img.double()).inverse
    return Cameras(lidar2img, inverse.to(dtype), image_size)
