"""The two designs before the attention bias: token features multiplied by a map of the queries' weights.

A renderer draws every query's weights into the token grids, a Gaussian over each of its windows:

    map[k] = sum_q g(q, k) w(q) / sum_q g(q, k)      over the queries in whose window token k lies, w(q) their weight
                                                     of the grid of k,
    map[k] = 1                                       where there is none

    v1:  f * map              v2:  f + 0.1 * f * (map - 1)

Kept for comparison. Unlike the bias, a map makes the weights of one query act on all others.

Shape letters: B batch, Q queries, K tokens, G grids, C channels.
"""

from typing import Literal

import torch
from torch import Tensor

from cmt_aqr.aqr.window_tokens import window_tokens
from cmt_aqr.attention import QueryWindows

# Standard deviation of the Gaussian in radii of the window.
SIGMA_IN_RADII = 0.5
# Share of the map in v2.
RESIDUAL_GAIN = 0.1


def gaussian_window(radius: int, *, like: Tensor) -> Tensor:
    """exp(-(dr^2 + dc^2) / (2 sigma^2)) over the window's square, row-major, T = (2 radius + 1)^2; 1 in the centre."""
    # A window of one cell has no width; any sigma gives 1.
    sigma = SIGMA_IN_RADII * max(radius, 1)
    steps = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    line = torch.exp(-(steps**2) / (2 * sigma**2))
    return (line[:, None] * line).flatten()


def render_map(windows: QueryWindows, weights: Tensor) -> Tensor:
    """The queries' weights as a map over all tokens.

    Args:
        windows: of the queries that are drawn.
        weights: (B, Q, G) of these queries.

    Returns:
        (B, K), dtype of the weights; exactly 1 where no window lies. Gradients reach the weights.
    """
    all_tokens, shares, weighted = [], [], []
    for number, grid in enumerate(windows.layout.grids):
        grid_tokens, is_valid = window_tokens(windows, number)
        one_window = gaussian_window(windows.settings.radius(grid), like=weights)
        all_tokens.append(grid_tokens)
        shares.append(one_window.repeat(windows.cells[number].shape[2]) * is_valid)
        weighted.append(shares[-1] * weights[..., number, None])
    tokens, share, weighted = (torch.cat(x, dim=-1) for x in (all_tokens, shares, weighted))

    batch_size, num_tokens = weights.shape[0], windows.layout.num_tokens
    rows = (tokens + num_tokens * torch.arange(batch_size, device=tokens.device)[:, None, None]).flatten()
    empty = weights.new_zeros(batch_size * num_tokens)
    # Entries that are not valid add 0 to token 0.
    total = empty.index_add(0, rows, weighted.flatten())
    coverage = empty.index_add(0, rows, share.flatten())
    is_covered = coverage > 0
    # The inner choice keeps 0 / 0 out of the backward pass.
    mean = total / torch.where(is_covered, coverage, 1)
    return torch.where(is_covered, mean, 1).view(batch_size, num_tokens)


def modulate(values: Tensor, token_map: Tensor, design: Literal["v1", "v2"]) -> Tensor:
    """Token features (B, K, C) modulated by a map (B, K); dtype of the features.

    ``v1``: f * map; ``v2``: f + 0.1 * f * (map - 1).
    """
    factor = token_map if design == "v1" else 1 + RESIDUAL_GAIN * (token_map - 1)
    return values * factor[..., None].to(values.dtype)
