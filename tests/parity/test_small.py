"""The golden files of the repository: small, and parts of the whole ones where those are at hand."""

import numpy as np
import pytest

from tests.parity.golden import SMALL_FOLDER, Golden, golden_dir
from tests.parity.make_small import small_files


def test_they_are_small():
    paths = list(SMALL_FOLDER.glob("*.npz"))
    assert {path.stem for path in paths} == {"head_train_layer0", "lam_windows", "decode"}
    assert sum(path.stat().st_size for path in paths) < 1_000_000


def test_they_are_parts_of_the_whole_ones():
    if not golden_dir().is_dir():
        pytest.skip(f"golden folder {golden_dir()} does not exist (set CMT_AQR_GOLDEN)")
    if (golden_dir() / "head_train.npz").stat().st_size != 4613708:
        pytest.skip("the golden folder holds another set of cases")
    for name, arrays in small_files():
        small = Golden(SMALL_FOLDER / f"{name}.npz")
        assert set(small.names) == set(arrays)
        assert all(np.array_equal(small[key], arrays[key]) for key in arrays)
