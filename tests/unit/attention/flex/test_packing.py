"""Packed coordinates: the window test on integers against loops over all cells."""

import pytest
import torch

from cmt_aqr.attention import QueryWindows
from cmt_aqr.attention import bias as plain
from cmt_aqr.attention.flex.packing import is_inside, make_packing, token_codes, window_codes
from cmt_aqr.attention.flex.schedule import partial_range
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import (
    BOTH,
    LAYOUTS,
    THREE,
    inside_by_loops,
    random_windows,
    sized,
    windows_at_every_cell,
)

R50 = fusion_layout((128, 128), (6, 20, 50))
VOV = fusion_layout((180, 180), (6, 40, 100))
GRIDS = {
    "rectangular": BOTH,
    "tall": fusion_layout((9, 2), (2, 7, 3)),
    "one row": fusion_layout((1, 11), (4, 1, 5)),
    "one column": fusion_layout((11, 1), (2, 6, 1)),
    "single cells": fusion_layout((1, 1), (3, 1, 1)),
    "lidar": fusion_layout((6, 8), None),
    "cameras": fusion_layout(None, (3, 4, 6)),
    "three": THREE,
}
# lidar, camera
SIZES = ((1, 1), (1, 2), (2, 1), (3, 4), (5, 8), (5, 15), (15, 3), (1, 60), (60, 1), (60, 9))


def inside_by_codes(windows):
    """(B, Q, K) bool as `is_inside` has it, over the whole plane: a window is tried on the tokens of all grids."""
    packing = make_packing(windows.layout, windows.settings)
    tokens = token_codes(windows.layout, packing)
    assert tokens.dtype == packing.dtype and tokens.shape == (windows.layout.num_tokens,)
    inside = torch.zeros(*windows.batch_and_queries, len(tokens), dtype=torch.bool)
    for number in range(len(windows.cells)):
        codes = window_codes(windows, packing, number)
        assert codes.dtype == packing.dtype
        inside |= is_inside(tokens, codes[..., None], packing).any(dim=2)
    return inside


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_codes_equal_loops_for_a_window_at_every_cell(layout, sizes):
    settings = sized(*sizes)
    windows = windows_at_every_cell(layout, settings)
    assert torch.equal(inside_by_codes(windows), inside_by_loops(windows))


def test_a_query_with_several_camera_windows():
    windows = random_windows(BOTH, sized(3, 4, camera_assignment="all"), queries=40)
    assert (windows.cells[1][..., 0] >= 0).sum(dim=-1).unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(inside_by_codes(windows), inside_by_loops(windows))


@pytest.mark.parametrize(
    ("layout", "sizes", "dtype"),
    (
        (R50, (5, 8), torch.int32),
        (VOV, (5, 8), torch.int32),
        (VOV, (5, 15), torch.int32),
        (VOV, (1, 1), torch.int32),
        (VOV, (60, 60), torch.int32),
        (R50, (5, 60), torch.int64),
        (VOV, (5, 60), torch.int64),
        (VOV, (1, 60), torch.int64),
    ),
    ids=str,
)
def test_codes_of_the_official_grids(layout, sizes, dtype):
    settings = sized(*sizes)
    windows = random_windows(layout, settings, batch=1, queries=24)
    # The corners of the grids, where the next row, the next view and the ends of the integers are near.
    for cells, grid in zip(windows.cells, layout.grids, strict=True):
        view, row, col = grid.views - 1, grid.rows - 1, grid.cols - 1
        cells[0, :4, 0] = torch.tensor([[0, 0, 0], [view, row, col], [0, row, col], [view, 0, 0]])
    assert make_packing(layout, settings).dtype == dtype
    expected = torch.cat([plain.is_inside(windows, number) for number in range(len(windows.cells))], dim=-1)
    assert torch.equal(inside_by_codes(windows), expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_and_their_differences_fit_their_integers(sizes):
    for layout in (R50, VOV, *GRIDS.values()):
        packing = make_packing(layout, sized(*sizes))
        last = (1 << 31 if packing.dtype == torch.int32 else 1 << 63) - 1
        largest = int(token_codes(layout, packing).max())
        assert largest < packing.no_window <= last
        assert packing.no_window < packing.high  # head room of the codes that the kernel uses


def test_no_window_holds_no_token():
    for layout in (R50, VOV, *GRIDS.values()):
        for sizes in SIZES:
            packing = make_packing(layout, sized(*sizes))
            no_window = torch.tensor(packing.no_window, dtype=packing.dtype)
            assert not is_inside(token_codes(layout, packing), no_window, packing).any()


def test_a_camera_without_a_window_keeps_its_place():
    settings = sized(3, 4, camera_assignment="all")
    cells = torch.tensor([[[[-1, 0, 0], [1, 2, 3], [-1, 0, 0]]]])
    packing = make_packing(BOTH, settings)
    codes = window_codes(QueryWindows(BOTH, settings, (torch.zeros(1, 1, 1, 3).long(), cells)), packing, 1)
    assert codes.shape == (1, 1, 3)
    assert (codes == packing.no_window).tolist() == [[[True, False, True]]]


@pytest.mark.parametrize("settings", [sized(5, 8), sized(3, 5, camera_assignment="all")])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_window_has_one_shape(layout, settings):
    """What the bias acts on, what the codes say, and what a schedule calls partial are the same cells."""
    windows = random_windows(layout, settings)
    inside = torch.cat([plain.is_inside(windows, number) for number in range(len(windows.cells))], dim=-1)
    assert torch.equal(inside_by_codes(windows), inside)
    order = torch.arange(inside.shape[1]).expand(len(inside), -1)
    token = torch.arange(layout.num_tokens)
    for number in range(len(windows.cells)):
        first, end = partial_range(windows, number, order, block_q=1, block_k=1)
        is_partial = (token >= first[..., None]) & (token < end[..., None])
        start, stop = layout.token_range(number)
        assert not (inside & ~is_partial)[..., start:stop].any()
        assert not is_partial[..., :start].any() and not is_partial[..., stop:].any()
