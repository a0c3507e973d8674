"""The golden files of the repository: small, and parts of the whole ones where those are at hand."""

import numpy as np
import pytest
import torch

from tests.parity.draws import Draw, find_draw, last_bits, restore
from tests.parity.golden import SMALL_FOLDER, Golden, golden_dir
from tests.parity.make_small import small_files


def test_they_are_small():
    paths = list(SMALL_FOLDER.glob("*.npz"))
    assert {path.stem for path in paths} == {
        "head_train_small", "head_eval_small", "lidar_image_small", "lam_windows", "decode",
    }  # fmt: skip
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


def test_draws_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(7)
    unit = torch.rand(50, 3, generator=generator).numpy()
    weights = torch.empty(32, 48).uniform_(-((6 / 80) ** 0.5), (6 / 80) ** 0.5, generator=generator).numpy()
    noise = torch.randn(37, generator=generator).numpy()  # two blocks and a rest
    found = [find_draw(array, 6) for array in (unit, weights, noise)]
    assert [(draw.law, draw.seed, draw.start) for draw in found] == [
        ("uniform", 7, 0), ("uniform", 7, 150), ("normal", 7, 150 + weights.size),
    ]  # fmt: skip
    assert np.array_equal(unit, found[0].numbers())
    for array, draw in zip((unit, weights, noise), found, strict=True):
        assert np.array_equal(restore(draw, last_bits(array, draw)), array)
        assert Draw.from_json(draw.to_json()) == draw
    assert find_draw(weights[:, ::-1].copy(), 6) is None
