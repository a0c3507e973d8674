"""Rotations of poses, without torch: the workers that record a synthetic world start faster."""

from collections.abc import Sequence

import numpy as np


def rotation_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Quaternion (w, x, y, z) of any length but 0 -> (3, 3) float64 rotation.

    pyquaternion differs in the last bit, which the bytes of a synthetic world and of an index would show.
    """
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
