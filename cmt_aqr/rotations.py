"""Rotations of poses, without torch: the workers that record a synthetic world start faster."""

import numpy as np
from numpy.typing import ArrayLike


def rotation_matrix(quaternion: ArrayLike) -> np.ndarray:
    """Quaternions (..., 4) w, x, y, z of any length but 0 -> (..., 3, 3) float64 rotations.

    pyquaternion differs in the last bit, which the bytes of a synthetic world and of an index would show.
    """
    quaternion = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return np.moveaxis(rows, (0, 1), (-2, -1))
