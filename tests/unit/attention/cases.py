"""Small token grids, random windows and inputs, and the definition of a window as plain loops."""

import itertools

import torch

from cmt_aqr.attention import AttentionBias, Grid, QueryWindows, TokenLayout, WindowSettings
from cmt_aqr.tools.attention_cases import fusion_layout


def sized(lidar=5, camera=8, *, radar=3, **options):
    """Window settings for the grids of the tests."""
    sizes = {"lidar": lidar, "camera": camera, "radar": radar}
    return WindowSettings(sizes, **options)


# No two sides are equal, and every grid is smaller than some windows and larger than others.
BOTH = fusion_layout((5, 7), (3, 4, 6))
LIDAR_ONLY = fusion_layout((5, 7), None)
CAMERA_ONLY = fusion_layout(None, (3, 4, 6))
# A sensor that the package does not know: a coarse map that begins 10 m inside the point range.
RADAR = Grid("radar", 1, 3, 4, origin=(-44.0, -44.0), cell_size=(22.0, 29.0))
THREE = TokenLayout((*BOTH.grids, RADAR))
LAYOUTS = {"both": BOTH, "lidar": LIDAR_ONLY, "camera": CAMERA_ONLY, "three": THREE}


def cell_of_token(layout, index):
    """Token index -> number of the grid, view, row, col, by counting."""
    for number, grid in enumerate(layout.grids):
        if index < grid.num_tokens:
            view, rest = divmod(index, grid.rows * grid.cols)
            return (number, view, *divmod(rest, grid.cols))
        index -= grid.num_tokens
    raise IndexError(index)


def num_lidar(layout):
    """Tokens of the BEV grid, which is the first one."""
    return layout.grids[0].num_tokens


def random_windows(layout, settings=None, *, batch=2, queries=9, seed=0):
    """Random cells; with a camera assignment of `all`, every view has a window or none at random."""
    settings = settings or sized(3, 4)
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, (batch, queries, *shape), generator=generator)

    cells = []
    for grid in layout.grids:
        if grid.cell_size is not None:
            view = -(draw(0, 6, 1) == 0).long()  # every sixth lies beyond the grid
        elif settings.camera_assignment == "first":
            view = draw(-1, grid.views, 1)
        else:
            view = torch.where(draw(0, 2, grid.views) == 1, torch.arange(grid.views), -1)
        row, col = draw(0, grid.rows, view.shape[-1]), draw(0, grid.cols, view.shape[-1])
        cells.append(torch.stack((view, row * (view >= 0), col * (view >= 0)), dim=-1))
    return QueryWindows(layout, settings, tuple(cells))


def windows_at_every_cell(layout, settings):
    """As many queries as the largest grid has cells, so that every cell is some query's; the last has no window."""
    num_queries = max(grid.num_tokens for grid in layout.grids) + 1
    cells = []
    for grid in layout.grids:
        all_cells = list(itertools.product(range(grid.views), range(grid.rows), range(grid.cols)))
        chosen = [all_cells[i % len(all_cells)] for i in range(num_queries - 1)]
        cells.append(torch.tensor([[*chosen, (-1, 0, 0)]])[:, :, None])
    return QueryWindows(layout, settings, tuple(cells))


def is_near(rows_away, cols_away, radius):
    """The window's shape, in plain numbers: the tests' own definition of ``attention.windows.in_window``."""
    return abs(rows_away) <= radius and abs(cols_away) <= radius


def inside_by_loops(windows):
    """Whether a token lies in a query's window of its own grid, (B, Q, K) bool, cell by cell."""
    layout, sizes = windows.layout, windows.settings.sizes
    batch, queries = windows.batch_and_queries
    inside = torch.zeros(batch, queries, layout.num_tokens, dtype=torch.bool)
    tokens = [cell_of_token(layout, index) for index in range(layout.num_tokens)]
    for b, q in itertools.product(range(batch), range(queries)):
        centres = [
            (number, *cell, sizes[grid.name] // 2)
            for number, grid in enumerate(layout.grids)
            for cell in windows.cells[number][b, q].tolist()
        ]
        for index, (number, view, row, col) in enumerate(tokens):
            for centre_grid, centre_view, centre_row, centre_col, radius in centres:
                is_there = (number, view) == (centre_grid, centre_view)
                if is_there and is_near(row - centre_row, col - centre_col, radius):
                    inside[b, q, index] = True
    return inside


def grid_of_tokens(layout):
    """Number of the grid of every token, (K,) int64."""
    return torch.tensor([cell_of_token(layout, index)[0] for index in range(layout.num_tokens)])


def bias_by_loops(bias):
    """The bias (B, Q, K) from its definition, in the dtype of its values."""
    values = bias.values[..., grid_of_tokens(bias.windows.layout)]
    return values * inside_by_loops(bias.windows) if bias.windows.settings.is_local else values


def random_bias(windows, *, seed=1, dtype=torch.float64, scale=2.0):
    """Values of either sign for every query and grid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*windows.batch_and_queries, len(windows.cells))
    values = torch.randn(shape, generator=generator, dtype=dtype) * scale
    return AttentionBias(windows, values)


def random_qkv(windows, *, heads=2, dim=4, seed=2, dtype=torch.float64):
    """q (B, M, Q, D), k and v (B, M, K, D) that fit the windows."""
    generator = torch.Generator().manual_seed(seed)
    batch, queries = windows.batch_and_queries
    lengths = (queries, windows.layout.num_tokens, windows.layout.num_tokens)
    return tuple(torch.randn(batch, heads, n, dim, generator=generator, dtype=dtype) for n in lengths)


def attention_by_loops(q, k, v, bias, token_mask=None):
    """softmax(q k^T / sqrt(D) + bias) v and its lse, one query at a time, float64; `bias` is (B, Q, K)."""
    q, k, v, bias = (x.detach().double() for x in (q, k, v, bias))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, m, i in itertools.product(*(range(size) for size in q.shape[:3])):
        allowed = torch.ones(k.shape[2], dtype=torch.bool) if token_mask is None else token_mask[b]
        if allowed.any():
            scores = ((k[b, m] * q[b, m, i]).sum(dim=1) / q.shape[-1] ** 0.5 + bias[b, i])[allowed]
            weights = (scores - scores.max()).exp()
            out[b, m, i] = (weights[:, None] * v[b, m, allowed]).sum(dim=0) / weights.sum()
            lse[b, m, i] = scores.max() + weights.sum().log()
    return out, lse
