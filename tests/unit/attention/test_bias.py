"""The bias: its strength, and the test whether a token lies in a window, against loops over all cells."""

import pytest
import torch

from cmt_aqr.attention import AttentionBias, QueryWindows, TokenLayout, WindowSettings, bias_strength
from cmt_aqr.attention.bias import CAMERA, LIDAR, code_plane, is_inside, token_codes, window_codes
from cmt_aqr.attention.schedule import touched_run
from cmt_aqr.attention.windows import bev_window_tokens, camera_window_tokens
from tests.unit.attention.cases import BOTH, inside_by_loops, random_windows, windows_at_every_cell

R50 = TokenLayout(bev_rows=128, bev_cols=128, num_views=6, pv_rows=20, pv_cols=50)
VOV = TokenLayout(bev_rows=180, bev_cols=180, num_views=6, pv_rows=40, pv_cols=100)
GRIDS = {
    "rectangular": BOTH,
    "tall": TokenLayout(bev_rows=9, bev_cols=2, num_views=2, pv_rows=7, pv_cols=3),
    "one row": TokenLayout(bev_rows=1, bev_cols=11, num_views=4, pv_rows=1, pv_cols=5),
    "one column": TokenLayout(bev_rows=11, bev_cols=1, num_views=2, pv_rows=6, pv_cols=1),
    "single cells": TokenLayout(bev_rows=1, bev_cols=1, num_views=3, pv_rows=1, pv_cols=1),
    "lidar": TokenLayout(bev_rows=6, bev_cols=8),
    "cameras": TokenLayout(num_views=3, pv_rows=4, pv_cols=6),
}
# bev, camera
SIZES = ((1, 1), (1, 2), (2, 1), (3, 4), (5, 8), (5, 15), (15, 3), (1, 60), (60, 1), (60, 9))


def inside_by_codes(windows):
    """(B, Q, K) bool as `is_inside` has it, over the whole plane: a BEV window is tried on camera tokens too."""
    plane = code_plane(windows.layout, windows.settings)
    tokens = token_codes(windows.layout, plane)
    assert tokens.dtype == plane.dtype and tokens.shape == (windows.layout.num_tokens,)
    inside = torch.zeros(*windows.batch_and_queries, len(tokens), dtype=torch.bool)
    for modality, cells in ((LIDAR, windows.bev_cells), (CAMERA, windows.camera_cells)):
        if cells is not None:
            codes = window_codes(windows, plane, modality)
            assert codes.dtype == plane.dtype
            inside |= is_inside(tokens, codes[..., None], plane).any(dim=2)
    return inside


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_codes_equal_loops_for_a_window_at_every_cell(layout, sizes):
    settings = WindowSettings(bev=sizes[0], camera=sizes[1])
    windows = windows_at_every_cell(layout, settings)
    assert torch.equal(inside_by_codes(windows), inside_by_loops(windows))


def test_a_query_with_several_camera_windows():
    windows = random_windows(BOTH, WindowSettings(bev=3, camera=4, camera_assignment="all"), queries=40)
    assert (windows.camera_cells[..., 0] >= 0).sum(dim=-1).unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(inside_by_codes(windows), inside_by_loops(windows))


def inside_by_distance(windows):
    """The definition in whole tensors, for grids on which loops take too long."""
    layout, settings = windows.layout, windows.settings
    cells = torch.tensor([layout.cell(index) for index in range(layout.num_tokens)])
    view, row, col = windows.bev_cells.unbind(-1)
    bev = torch.stack((torch.where(view >= 0, -1, -2), row, col), dim=-1)  # -1: the view of BEV tokens in `cells`
    inside = torch.zeros(*windows.batch_and_queries, layout.num_tokens, dtype=torch.bool)
    for centre, radius in ((bev, settings.bev // 2), (windows.camera_cells, settings.camera // 2)):
        for n in range(centre.shape[2]):
            distance = (cells - centre[:, :, n, None]).abs()
            same_view = distance[..., 0] == 0
            is_window = same_view & (distance[..., 1:] <= radius).all(dim=-1)
            if centre is not bev:
                is_window &= centre[:, :, n, :1] >= 0
            inside |= is_window
    return inside


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
    settings = WindowSettings(bev=sizes[0], camera=sizes[1])
    windows = random_windows(layout, settings, batch=1, queries=24)
    # The corners of the grids, where the next row, the next view and the ends of the integers are near.
    last = (layout.bev_rows - 1, layout.bev_cols - 1)
    windows.bev_cells[0, :4, 0] = torch.tensor([[0, 0, 0], [0, *last], [0, 0, last[1]], [0, last[0], 0]])
    view, row, col = layout.num_views - 1, layout.pv_rows - 1, layout.pv_cols - 1
    windows.camera_cells[0, :4, 0] = torch.tensor([[0, 0, 0], [view, row, col], [0, row, col], [view, 0, 0]])
    assert code_plane(layout, settings).dtype == dtype
    assert torch.equal(inside_by_codes(windows), inside_by_distance(windows))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_and_their_differences_fit_their_integers(sizes):
    for layout in (R50, VOV, *GRIDS.values()):
        plane = code_plane(layout, WindowSettings(bev=sizes[0], camera=sizes[1]))
        last = (1 << 31 if plane.dtype == torch.int32 else 1 << 63) - 1
        largest = int(token_codes(layout, plane).max())
        assert largest < plane.nowhere <= last
        assert plane.nowhere < plane.high  # head room of the codes that the kernel uses


def test_nowhere_holds_no_token():
    for layout in (R50, VOV, *GRIDS.values()):
        for bev, camera in SIZES:
            plane = code_plane(layout, WindowSettings(bev=bev, camera=camera))
            nowhere = torch.tensor(plane.nowhere, dtype=plane.dtype)
            assert not is_inside(token_codes(layout, plane), nowhere, plane).any()


def test_a_camera_window_that_is_nowhere_keeps_its_place():
    settings = WindowSettings(bev=3, camera=4, camera_assignment="all")
    cells = torch.tensor([[[[-1, 0, 0], [1, 2, 3], [-1, 0, 0]]]])
    plane = code_plane(BOTH, settings)
    codes = window_codes(QueryWindows(BOTH, settings, torch.zeros(1, 1, 1, 3).long(), cells), plane, CAMERA)
    assert codes.shape == (1, 1, 3)
    assert (codes == plane.nowhere).tolist() == [[[True, False, True]]]


def test_single_codes_as_in_a_score_mod():
    windows = random_windows(BOTH)
    plane = code_plane(BOTH, windows.settings)
    tokens, codes = token_codes(BOTH, plane), window_codes(windows, plane, LIDAR)
    view, row, col = windows.bev_cells[0, 0, 0].tolist()
    assert view == 0
    found = [bool(is_inside(tokens[index], codes[0, 0, 0], plane)) for index in range(len(tokens))]
    assert found == [
        view < 0 and abs(token_row - row) <= 1 and abs(token_col - col) <= 1
        for view, token_row, token_col in map(BOTH.cell, range(BOTH.num_tokens))
    ]


def test_strength_is_scaled_and_clamped():
    weights = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    assert bias_strength(weights, 4.0, 3.0).tolist() == [[-3.0, -2.0, 0.0, 2.0, 3.0]]
    assert bias_strength(weights, 4.0, None).tolist() == [[-4.0, -2.0, 0.0, 2.0, 4.0]]
    assert bias_strength(weights, torch.tensor([4.0]), 3.0).shape == weights.shape


@pytest.mark.parametrize("compiler", (None, "aot_eager"))
def test_a_bias_exactly_at_its_limit_keeps_its_gradient(compiler):
    # torch.clamp gives 1 up to PyTorch 2.11 and 0 later: training would depend on the version.
    function = bias_strength if compiler is None else torch.compile(bias_strength, backend=compiler)
    weights = torch.tensor([1.25, -1.25, 1.2500001, -1.2500001, 1.0, 0.0, float("nan")], requires_grad=True)
    bias = function(weights, 4.0, 5.0)
    assert bias[:6].tolist() == [5.0, -5.0, 5.0, -5.0, 4.0, 0.0] and bias[6].isnan()
    (grad,) = torch.autograd.grad(bias.sum(), weights)
    assert grad[:6].tolist() == [4.0, 4.0, 0.0, 0.0, 4.0, 4.0]


def test_gradients_of_the_strength():
    weights = torch.tensor([-1.0, -0.5, 0.25, 0.75], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    bias_strength(weights, scale, 2.5).sum().backward()
    # Nothing where it is clamped; else d/dw = scale, d/dscale = w.
    assert weights.grad.tolist() == [0.0, 4.0, 4.0, 0.0]
    assert scale.grad.item() == -0.25
    weights.grad = scale.grad = None
    bias_strength(weights, scale, None).sum().backward()
    assert weights.grad.tolist() == [4.0] * 4 and scale.grad.item() == -0.5


@pytest.mark.parametrize("shape", ((2, 9), (2, 9, 1), (2, 8, 2), (1, 9, 2), (2, 9, 2, 1)))
def test_a_strength_of_another_shape_is_refused(shape):
    message = rf"^the strength of a bias must have shape \(2, 9, 2\), got \({', '.join(map(str, shape))}\)$"
    with pytest.raises(ValueError, match=message):
        AttentionBias(random_windows(BOTH), torch.zeros(shape))


@pytest.mark.parametrize("settings", [WindowSettings(), WindowSettings(bev=3, camera=5, camera_assignment="all")])
def test_the_window_has_one_shape(settings):
    """What the weights are read off, what the bias acts on and what a schedule says is touched are the same cells."""
    windows = random_windows(BOTH, settings)
    plane = code_plane(BOTH, settings)
    codes = token_codes(BOTH, plane)
    for modality, tokens_of in ((LIDAR, bev_window_tokens), (CAMERA, camera_window_tokens)):
        tokens, is_valid = tokens_of(windows)
        listed = torch.zeros(*tokens.shape[:2], BOTH.num_tokens + 1, dtype=torch.bool)
        listed.scatter_(2, torch.where(is_valid, tokens, BOTH.num_tokens), True)
        inside = is_inside(codes, window_codes(windows, plane, modality)[..., None], plane).any(dim=2)
        assert torch.equal(listed[..., :-1], inside)
        order = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        first, last = touched_run(windows, modality, order, block_q=1, block_k=1)
        token = torch.arange(BOTH.num_tokens)
        touched = (token >= first[..., None]) & (token < last[..., None])
        assert not (inside & ~touched).any()
