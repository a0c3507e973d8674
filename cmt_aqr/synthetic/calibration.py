"""The sensor rig: nuScenes' published sensor set-up (mounting positions, rotations, intrinsics), rounded.

Frames: ego is x forward, y left, z up with z = 0 on the ground; a camera is x right, y down, z forward; the LiDAR is
x right, y forward, z up. Every rotation is a quaternion (w, x, y, z) that takes sensor vectors to ego vectors.
"""

import math
from dataclasses import dataclass

import numpy as np

FULL_IMAGE_SIZE = (1600, 900)
"""Image width and height, in pixels, that the published intrinsics belong to."""

LIDAR_CHANNEL = "LIDAR_TOP"
LIDAR_TRANSLATION = (0.943713, 0.0, 1.84023)
LIDAR_ROTATION = (np.sqrt(0.5), 0.0, 0.0, -np.sqrt(0.5))
"""Exactly -90 degrees about z: columns of the range image are then vertical planes, which the ray caster relies on."""


@dataclass(frozen=True)
class CameraMount:
    """One camera: name, place on the ego (m), rotation to the ego, focal length and principal point at 1600 x 900 (px).

    delay_s is its time stamp minus that of the key-frame LiDAR sweep, because each camera fires when the beam passes.
    """

    channel: str
    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    focal: float
    centre: tuple[float, float]
    delay_s: float


CAMERAS = (
    CameraMount(
        "CAM_FRONT",
        (1.7008, 0.0159, 1.5110),
        (0.499802, -0.503032, 0.499780, -0.497371),
        1266.417,
        (816.267, 491.507),
        -0.0355,
    ),
    CameraMount(
        "CAM_FRONT_RIGHT",
        (1.5508, -0.4934, 1.4957),
        (0.206035, -0.202694, 0.682451, -0.671361),
        1260.847,
        (807.968, 495.334),
        -0.0276,
    ),
    CameraMount(
        "CAM_FRONT_LEFT",
        (1.5239, 0.4946, 1.5093),
        (0.675726, -0.673627, 0.212140, -0.211228),
        1272.598,
        (826.615, 479.752),
        -0.0431,
    ),
    CameraMount(
        "CAM_BACK",
        (0.0283, 0.0035, 1.5791),
        (0.503787, -0.497402, -0.494185, 0.504550),
        809.221,
        (829.220, 481.778),
        -0.0104,
    ),
    CameraMount(
        "CAM_BACK_LEFT",
        (1.0357, 0.4848, 1.5910),
        (0.692419, -0.703162, -0.116483, 0.112033),
        1256.741,
        (792.113, 492.776),
        -0.0005,
    ),
    CameraMount(
        "CAM_BACK_RIGHT",
        (1.0149, -0.4806, 1.5624),
        (0.122810, -0.132401, -0.700431, 0.690496),
        1259.514,
        (807.253, 501.196),
        -0.0201,
    ),
)
"""The six cameras in the order that is part of the project's numerics."""

CAMERA_CHANNELS = tuple(camera.channel for camera in CAMERAS)


def unit_quaternion(rotation: tuple[float, float, float, float]) -> np.ndarray:
    """Quaternion (4,) of length one: the published numbers are rounded."""
    quaternion = np.asarray(rotation, dtype=np.float64)
    return quaternion / np.linalg.norm(quaternion)


def yaw_quaternion(yaw: float) -> list[float]:
    """Quaternion (w, x, y, z) of a turn by yaw radians about the z axis."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def intrinsic_matrix(camera: CameraMount, image_size: tuple[int, int]) -> np.ndarray:
    """Pinhole matrix (3, 3) in pixels of an image of image_size (width, height)."""
    scale_x = image_size[0] / FULL_IMAGE_SIZE[0]
    scale_y = image_size[1] / FULL_IMAGE_SIZE[1]
    return np.array(
        [
            [camera.focal * scale_x, 0.0, camera.centre[0] * scale_x],
            [0.0, camera.focal * scale_y, camera.centre[1] * scale_y],
            [0.0, 0.0, 1.0],
        ]
    )


def inverse_intrinsic(matrix: np.ndarray) -> np.ndarray:
    """Inverse (3, 3) of an intrinsic matrix, in closed form: numpy's inverse wakes threads that keep a core busy."""
    (fx, _, cx), (_, fy, cy), _ = matrix
    return np.array([[1.0 / fx, 0.0, -cx / fx], [0.0, 1.0 / fy, -cy / fy], [0.0, 0.0, 1.0]])
