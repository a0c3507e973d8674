"""The attention bias: what it is, and the test whether a token lies in a query's window.

    score[q, k] = q . k / sqrt(D) + bias[q, k]
    bias[q, k]  = clamp(scale * weight[q, g], -max_bias, max_bias)   if token k, of grid g, lies in q's window there,
                  0                                                  otherwise

A token lies in a window of its own view whose centre is near enough in rows and columns (``windows.in_window``).

Shape letters: B batch, Q queries, G grids, N windows of a query in one grid, K tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .windows import QueryWindows, in_window


@dataclass(frozen=True)
class AttentionBias:
    """A bias for the cross-attention of one batch, shared by all heads and layers.

    Attributes:
        windows: where it acts.
        values: (B, Q, G) floating point: what is added to the scores in a query's windows in every grid.
    """

    windows: QueryWindows
    values: Tensor

    def __post_init__(self) -> None:
        expected = (*self.windows.batch_and_queries, len(self.windows.layout.grids))
        if tuple(self.values.shape) != expected:
            raise ValueError(f"the values of a bias must have shape {expected}, got {tuple(self.values.shape)}")


def bias_values(weights: Tensor, scale: Tensor | float, max_bias: float | None) -> Tensor:
    """clamp(scale * weights, -max_bias, max_bias); any shape; None: no clamp.

    A product exactly at a limit keeps its gradient: it has to be able to come back.
    """
    values = scale * weights
    if max_bias is None:
        return values
    # Not torch.clamp, whose gradient exactly at a limit is 1 up to PyTorch 2.11 and 0 in later versions.
    values = torch.where(values > max_bias, max_bias, values)
    return torch.where(values < -max_bias, -max_bias, values)


def is_inside(windows: QueryWindows, number: int, queries: slice = slice(None)) -> Tensor:
    """Whether the tokens of grid ``number`` lie in a window of these queries: (B, Q, tokens of the grid) bool."""
    grid, centres = windows.layout.grids[number], windows.cells[number][:, queries]
    view, row, col = centres[..., None, None, None, :].unbind(-1)  # (B, Q, N, 1, 1, 1), against (views, rows, cols)
    views, rows, cols = (torch.arange(size, device=centres.device) for size in (grid.views, grid.rows, grid.cols))
    radius = windows.settings.radius(grid)
    rows_away = torch.where(views[:, None, None] == view, rows[:, None] - row, grid.rows + radius)  # else too far away
    return in_window(rows_away, cols - col, radius).any(dim=2).flatten(2)
