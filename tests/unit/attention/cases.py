"""Small token grids, random windows and inputs, and the definition of a window as plain loops."""

import itertools

import torch

from cmt_aqr.attention import AttentionBias, QueryWindows, TokenLayout, WindowSettings

# No two sides are equal, and every grid is smaller than some windows and larger than others.
BOTH = TokenLayout(bev_rows=5, bev_cols=7, num_views=3, pv_rows=4, pv_cols=6)
LIDAR_ONLY = TokenLayout(bev_rows=5, bev_cols=7)
CAMERA_ONLY = TokenLayout(num_views=3, pv_rows=4, pv_cols=6)
LAYOUTS = {"both": BOTH, "lidar": LIDAR_ONLY, "camera": CAMERA_ONLY}


def random_windows(layout, settings=None, *, batch=2, queries=9, seed=0):
    """Random cells; with a camera assignment of `all`, every view has a window or none at random."""
    settings = settings or WindowSettings(bev=3, camera=4)
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, (batch, queries, *shape), generator=generator)

    bev_cells = camera_cells = None
    if layout.num_bev:
        view = -(draw(0, 6, 1) == 0).long()  # every sixth lies beyond the grid
        row, col = draw(0, layout.bev_rows, 1), draw(0, layout.bev_cols, 1)
        bev_cells = torch.stack((view, row * (view >= 0), col * (view >= 0)), dim=-1)
    if layout.num_pv:
        if settings.camera_assignment == "first":
            view = draw(-1, layout.num_views, 1)
        else:
            view = torch.where(draw(0, 2, layout.num_views) == 1, torch.arange(layout.num_views), -1)
        row, col = draw(0, layout.pv_rows, view.shape[-1]), draw(0, layout.pv_cols, view.shape[-1])
        camera_cells = torch.stack((view, row * (view >= 0), col * (view >= 0)), dim=-1)
    return QueryWindows(layout, settings, bev_cells, camera_cells)


def windows_at_every_cell(layout, settings):
    """As many queries as the larger modality has cells, so that every cell is some query's; the last has no window."""
    num_queries = max(layout.num_bev, layout.num_pv) + 1
    bev_cells = camera_cells = None
    if layout.num_bev:
        cells = list(itertools.product(range(layout.bev_rows), range(layout.bev_cols)))
        chosen = [(0, *cells[i % len(cells)]) for i in range(num_queries - 1)]
        bev_cells = torch.tensor([[*chosen, (-1, 0, 0)]])[:, :, None]
    if layout.num_pv:
        cells = list(itertools.product(range(layout.num_views), range(layout.pv_rows), range(layout.pv_cols)))
        chosen = [cells[i % len(cells)] for i in range(num_queries - 1)]
        camera_cells = torch.tensor([[*chosen, (-1, 0, 0)]])[:, :, None]
    return QueryWindows(layout, settings, bev_cells, camera_cells)


def inside_by_loops(windows):
    """Whether a token lies in a query's window of its own modality, (B, Q, K) bool, cell by cell."""
    layout, settings = windows.layout, windows.settings
    batch, queries = windows.batch_and_queries
    inside = torch.zeros(batch, queries, layout.num_tokens, dtype=torch.bool)
    tokens = [layout.cell(index) for index in range(layout.num_tokens)]
    for b, q in itertools.product(range(batch), range(queries)):
        centres = []
        if windows.bev_cells is not None:
            view, row, col = windows.bev_cells[b, q, 0].tolist()
            if view >= 0:
                centres.append((-1, row, col, settings.bev // 2))
        if windows.camera_cells is not None:
            for view, row, col in windows.camera_cells[b, q].tolist():
                if view >= 0:
                    centres.append((view, row, col, settings.camera // 2))
        for index, (view, row, col) in enumerate(tokens):
            for centre_view, centre_row, centre_col, radius in centres:
                if view == centre_view and abs(row - centre_row) <= radius and abs(col - centre_col) <= radius:
                    inside[b, q, index] = True
    return inside


def bias_by_loops(bias):
    """The bias (B, Q, K) from its definition, in the dtype of its strength."""
    layout = bias.windows.layout
    is_camera = (torch.arange(layout.num_tokens) >= layout.num_bev).long()
    strength = bias.strength[..., is_camera]  # (B, Q, K)
    return strength * inside_by_loops(bias.windows) if bias.windows.settings.is_local else strength


def random_bias(windows, *, seed=1, dtype=torch.float64, scale=2.0):
    """A strength of either sign for every query and modality."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(*windows.batch_and_queries, 2, generator=generator, dtype=dtype) * scale
    return AttentionBias(windows, strength)


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
