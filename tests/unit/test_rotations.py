"""Quaternion to matrix, compared with scipy."""

import numpy as np
from scipy.spatial.transform import Rotation

from cmt_aqr.rotations import rotation_matrix


def test_rotation_matrix_against_scipy():
    for q in np.random.default_rng(0).normal(size=(10, 4)):
        np.testing.assert_allclose(rotation_matrix(q), Rotation.from_quat(q[[1, 2, 3, 0]]).as_matrix(), atol=1e-15)
