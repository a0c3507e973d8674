"""The renderer against plain loops, and the two ways to use its map."""

import itertools
import math

import pytest
import torch

from cmt_aqr.aqr.modulation import gaussian_window, modulate, render_map
from cmt_aqr.attention import QueryWindows
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import BOTH, LAYOUTS, cell_of_token, is_near, random_windows, sized

SETTINGS = {
    "first": sized(3, 4),
    "all": sized(5, 2, camera_assignment="all"),
    "cells": sized(1, 1),
}


def map_by_loops(windows, weights):
    """The map (B, K) from its definition, cell by cell."""
    layout, sizes = windows.layout, windows.settings.sizes
    batch, queries = windows.batch_and_queries
    result = torch.ones(batch, layout.num_tokens, dtype=weights.dtype)
    for b, index in itertools.product(range(batch), range(layout.num_tokens)):
        number, view, row, col = cell_of_token(layout, index)
        radius = sizes[layout.grids[number].name] // 2
        weighted = coverage = 0.0
        for q in range(queries):
            weight = weights[b, q, number]
            for centre_view, centre_row, centre_col in windows.cells[number][b, q].tolist():
                dr, dc = row - centre_row, col - centre_col
                if centre_view == view and is_near(dr, dc, radius):
                    share = math.exp(-(dr**2 + dc**2) / (2 * (0.5 * max(radius, 1)) ** 2))
                    weighted, coverage = weighted + share * weight, coverage + share
        if coverage:
            result[b, index] = weighted / coverage
    return result


def random_weights(windows, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*windows.batch_and_queries, len(windows.cells), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", ("both", "three"))
def test_the_map_equals_its_definition(settings, layout):
    windows = random_windows(LAYOUTS[layout], settings, queries=6)
    weights = random_weights(windows)
    actual, expected = render_map(windows, weights), map_by_loops(windows, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    is_covered = expected != 1
    assert 0.05 < is_covered.double().mean() < 0.95
    assert (actual[~is_covered] == 1).all()


def test_gradients_reach_the_weights():
    windows = random_windows(BOTH, queries=8)
    weights = random_weights(windows).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: render_map(windows, w), weights)
    render_map(windows, weights).sum().backward()
    has_window = torch.cat((windows.cells[0][..., 0], windows.cells[1][..., 0]), dim=-1) >= 0
    assert 0 < has_window[..., 0].sum() < has_window[..., 0].numel()
    assert torch.equal(weights.grad > 0, has_window)


def test_one_query_draws_its_weight_and_several_draw_their_mean():
    settings = sized(3, 3)
    layout = fusion_layout((6, 6), (1, 3, 3))

    def windows_at(*cells):
        camera = torch.tensor([[[-1, 0, 0]] * len(cells)])[:, :, None]
        bev = torch.tensor([[(0, *cell) for cell in cells]])[:, :, None]
        return QueryWindows(layout, settings, (bev, camera))

    alone = render_map(windows_at((2, 2)), torch.tensor([[[0.25, 0.75]]]))
    grid = alone[0, :36].view(6, 6)
    torch.testing.assert_close(grid[1:4, 1:4], torch.full((3, 3), 0.25))
    assert (alone != 1).sum() == 9  # nothing in the camera, which does not see the query
    several = render_map(windows_at((2, 2), (2, 2)), torch.tensor([[[0.2, 0.0], [0.6, 0.0]]]))
    torch.testing.assert_close(several[0, :36].view(6, 6)[1:4, 1:4], torch.full((3, 3), 0.4))
    # Half-way between two queries counts each the same, elsewhere the nearer one counts more.
    row = render_map(windows_at((2, 1), (2, 3)), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))[0, :36].view(6, 6)[2]
    torch.testing.assert_close(row, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))


def test_samples_do_not_mix():
    windows = random_windows(BOTH, queries=5)
    weights = random_weights(windows)
    together = render_map(windows, weights)
    for b in range(2):
        one = QueryWindows(BOTH, windows.settings, tuple(cells[b : b + 1] for cells in windows.cells))
        torch.testing.assert_close(together[b : b + 1], render_map(one, weights[b : b + 1]), rtol=1e-14, atol=0)


def test_the_gaussian_falls_to_its_corners():
    window = gaussian_window(2, like=torch.zeros((), dtype=torch.float64)).view(5, 5)
    assert window[2, 2] == 1 and window.max() == 1
    assert window[2, 4].item() == pytest.approx(math.exp(-2)) and window[0, 0].item() == pytest.approx(math.exp(-4))
    torch.testing.assert_close(window, window.T)
    assert gaussian_window(0, like=torch.zeros(())).tolist() == [1.0]


def test_the_two_designs():
    values = torch.randn(2, 4, 3, dtype=torch.float64)
    token_map = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.2, 0.4, 0.6, 1.0]], dtype=torch.float64)
    for b, k in itertools.product(range(2), range(4)):
        factor = token_map[b, k].item()
        torch.testing.assert_close(modulate(values, token_map, "v1")[b, k], values[b, k] * factor)
        expected = values[b, k] + 0.1 * values[b, k] * (factor - 1)
        torch.testing.assert_close(modulate(values, token_map, "v2")[b, k], expected)
    for design in ("v1", "v2"):
        kept = modulate(values.bfloat16(), torch.ones(2, 4), design)
        assert kept.dtype == torch.bfloat16 and torch.equal(kept, values.bfloat16())
