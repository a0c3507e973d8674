import numpy as np
import pytest
import torch

from cmt_aqr.models.grid_mask import GridMaskDraw, draw_grid_mask, grid_mask


def naive_grid_mask(draw, height, width, ratio=0.5):
    """The definition: paint the bars of the large pattern one by one, then cut out its middle."""
    large = [int(1.5 * size) for size in (height, width)]
    bar = min(max(int(draw.period * ratio + 0.5), 1), draw.period - 1)
    pattern = torch.zeros(large, dtype=torch.bool)
    for i in range(large[0] // draw.period):
        pattern[draw.row_offset + i * draw.period :][:bar] = True
    for i in range(large[1] // draw.period):
        pattern[:, draw.col_offset + i * draw.period :][:, :bar] = True
    top, left = (large[0] - height) // 2, (large[1] - width) // 2
    return pattern[top : top + height, left : left + width]


@pytest.mark.parametrize("rng", [np.random.default_rng(0), np.random.RandomState(0)], ids=["generator", "legacy"])
def test_equals_the_definition(rng):
    for height, width in ((32, 48), (7, 5), (64, 96), (33, 31)):
        for _ in range(30):
            draw = draw_grid_mask(rng, height=height, probability=1.0)
            assert 2 <= draw.period < height
            assert 0 <= draw.row_offset < draw.period and 0 <= draw.col_offset < draw.period
            mask = grid_mask(draw, height=height, width=width)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, naive_grid_mask(draw, height, width))


def test_probability_and_ratio():
    rng = np.random.default_rng(1)
    drawn = sum(draw_grid_mask(rng, height=64, probability=0.7) is not None for _ in range(2000))
    assert abs(drawn / 2000 - 0.7) < 0.04
    assert draw_grid_mask(rng, height=64, probability=0.0) is None
    kept = grid_mask(GridMaskDraw(10, 0, 0), height=100, width=100, ratio=0.2).float().mean()
    assert abs(kept - (1 - 0.8**2)) < 0.05


def test_too_few_rows():
    with pytest.raises(ValueError, match="at least 3 rows, got 2"):
        draw_grid_mask(np.random.default_rng(0), height=2)
