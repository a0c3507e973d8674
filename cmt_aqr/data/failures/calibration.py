"""Wrong calibration of cameras: the matrices given to the network change, the images and the ground truth do not.

*Source*: nuScenes-R (Yu et al., 2205.14951), program `create_noise_data_nuscenes.py`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# Nominal degrees, which the program's theta / 360 pi halves, and metres.
ROTATION, TRANSLATION = (1.0, 5.0), (0.005, 0.010)


def disturb(
    lidar2img: Tensor,
    lidar2ego: Tensor,
    views: Sequence[int],
    kind: Literal["single", "all"],
    rng: np.random.Generator,
) -> Tensor:
    """Rotate and shift the pose of cameras on the vehicle.

    A rotation by 0.5 to 2.5 degrees (nominally 1 to 5), in either direction, about an axis that is uniform on the
    sphere, then a shift of 0.5 to 1.0 cm, in either direction, along each axis; both in the ego frame.

    Args:
        lidar2img: (V, 4, 4) float64, LiDAR frame -> pixels.
        lidar2ego: (4, 4) float64.
        views: indices of the cameras that are disturbed.
        kind: ``single``: each camera has a disturbance of its own; ``all``: all have the same.

    Returns:
        (V, 4, 4): lidar2img E^-1 N^-1 E with E = lidar2ego, N the disturbance.

    *Source*: nuScenes-R, extrinsics noise. Its E also contains the vehicle's motion between the LiDAR's and the
    camera's time stamp, some centimetres, which changes the result by about a millimetre.
    """
    result = lidar2img.clone()
    ego2lidar = torch.linalg.inv(lidar2ego)
    shared = disturbance(rng)
    for view in views:
        noise = shared if kind == "all" else disturbance(rng)
        result[view] = lidar2img[view] @ ego2lidar @ torch.linalg.inv(noise) @ lidar2ego
    return result


def disturbance(rng: np.random.Generator) -> Tensor:
    """One random rotation and shift, (4, 4) float64; see :func:`disturb`."""
    cos_polar, azimuth = 1 - 2 * rng.random(), 2 * math.pi * rng.random()
    sin_polar = math.sqrt(1 - cos_polar**2)
    x, y, z = sin_polar * math.cos(azimuth), sin_polar * math.sin(azimuth), cos_polar
    angle = math.radians(rng.uniform(*ROTATION) / 2) * rng.choice((-1, 1))
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] += math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    matrix[:3, 3] = torch.from_numpy(rng.uniform(*TRANSLATION, 3) * rng.choice((-1, 1), 3))
    return matrix
