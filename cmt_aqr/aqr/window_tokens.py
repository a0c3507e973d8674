"""The tokens in a query's windows, as indices: what the weight generator reads and the maps of v1 and v2 draw on.

Shape letters: B batch, Q queries, N windows of a query in one grid, T tokens in the windows of a query.
"""

import torch
from torch import Tensor

from cmt_aqr.attention import QueryWindows
from cmt_aqr.attention.windows import in_window


def window_tokens(windows: QueryWindows, number: int) -> tuple[Tensor, Tensor]:
    """Token indices of the windows in grid ``number``, all N of a query side by side.

    Returns:
        tokens (B, Q, T) int64 index on the token axis, T = N (2 radius + 1)^2, 0 where not valid; is_valid (B, Q, T)
        bool: the cell is in the window and inside the grid.
    """
    grid = windows.layout.grids[number]
    radius = windows.settings.radius(grid)
    cols_away = torch.arange(-radius, radius + 1, device=windows.cells[number].device)
    rows_away = cols_away[:, None]
    view, row, col = windows.cells[number][..., None, None, :].unbind(-1)
    row, col = row + rows_away, col + cols_away
    is_on_grid = (view >= 0) & (row >= 0) & (row < grid.rows) & (col >= 0) & (col < grid.cols)
    is_valid = is_on_grid & in_window(rows_away, cols_away, radius)
    tokens = torch.where(is_valid, windows.layout.index(number, view, row, col), 0)
    return tokens.flatten(2), is_valid.flatten(2)


def all_window_tokens(windows: QueryWindows) -> tuple[Tensor, Tensor]:
    """All window tokens of a query side by side, in the order of the grids.

    Returns:
        tokens (B, Q, T) int64 index on the token axis, 0 where not valid; is_valid (B, Q, T) bool.
    """
    tokens, is_valid = zip(*(window_tokens(windows, g) for g in range(len(windows.cells))), strict=True)
    return torch.cat(tokens, dim=-1), torch.cat(is_valid, dim=-1)
