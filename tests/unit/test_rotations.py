"""Quaternion to matrix, compared with scipy."""

import numpy as np
from scipy.spatial.transform import Rotation

from cmt_aqr.rotations import rotation_matrix


def test_rotation_matrix_against_scipy():
    for q in np.random.default_rng(0).normal(size=(10, 4)):
        np.testing.assert_allclose(rotation_matrix(q), Rotation.from_quat(q[[1, 2, 3, 0]]).as_matrix(), atol=1e-15)


def test_many_at_once_have_the_bits_of_single_ones():
    quaternions = np.random.default_rng(1).normal(size=(3, 5, 4))
    matrices = rotation_matrix(quaternions)
    assert matrices.shape == (3, 5, 3, 3)
    for i in np.ndindex(3, 5):
        np.testing.assert_array_equal(matrices[i], rotation_matrix(quaternions[i]))
