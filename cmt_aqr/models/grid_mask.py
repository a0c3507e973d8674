"""GridMask: hides a regular pattern of rectangles of the training images.

The random draws and the formula are separate: `draw_grid_mask` takes a generator, `grid_mask` only its result.

*Source*: Chen et al., "GridMask Data Augmentation", 2020; the original program's GridMask with mode 1, no rotation.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The mask is cut from the middle of a pattern this many times as large, as if it were to be rotated.
PATTERN_SCALE = 1.5


class GridMaskDraw(NamedTuple):
    """One random grid. period: pixels between bars, in both directions. row_offset, col_offset: in [0, period)."""

    period: int
    row_offset: int
    col_offset: int


def draw_grid_mask(
    rng: np.random.Generator | np.random.RandomState, *, height: int, probability: float = 0.7
) -> GridMaskDraw | None:
    """Draws a grid for images of `height` pixels; None, with probability 1 - `probability`, means no mask.

    The order of the draws is the original's, so a RandomState of the same seed gives the same grid.
    """
    if height < 3:
        raise ValueError(f"GridMask needs images of at least 3 rows, got {height}")
    if rng.random() > probability:
        return None
    integers = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
    period = int(integers(2, height))
    return GridMaskDraw(period, int(integers(period)), int(integers(period)))


def grid_mask(
    draw: GridMaskDraw, *, height: int, width: int, ratio: float = 0.5, device: torch.device | None = None
) -> Tensor:
    """Mask (H, W) bool; True = the pixel is kept, it lies in a horizontal or a vertical bar.

    Bars are round(ratio * period) pixels wide, at least 1 and at most period - 1.
    """
    bar = min(max(int(draw.period * ratio + 0.5), 1), draw.period - 1)
    rows = _in_bar(height, period=draw.period, offset=draw.row_offset, bar=bar, device=device)
    cols = _in_bar(width, period=draw.period, offset=draw.col_offset, bar=bar, device=device)
    return rows[:, None] | cols[None, :]


def _in_bar(size: int, *, period: int, offset: int, bar: int, device: torch.device | None) -> Tensor:
    """(size,) bool: pixels of the middle of the large pattern whose phase lies in [0, bar)."""
    pattern = int(PATTERN_SCALE * size)
    position = torch.arange(size, device=device) + (pattern - size) // 2 - offset
    # The pattern has pattern // period bars, the first one at `offset`: none before it, none after the last.
    is_counted = (position >= 0) & (position < pattern // period * period)
    return is_counted & (position % period < bar)
