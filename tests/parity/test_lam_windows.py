"""Attention windows against the indices of the published AQR, key by key (see tests/parity/golden.py).

A point exactly on the far border of the range is the one deviation (Quirk Q12) and has a test of its own.
"""

import pytest
import torch

from cmt_aqr.aqr.window_tokens import window_tokens
from cmt_aqr.attention import AttentionBias, Grid, TokenLayout, query_windows
from cmt_aqr.attention.dense import dense_bias
from cmt_aqr.attention.flex.packing import is_inside, make_packing, token_codes, window_codes
from cmt_aqr.attention.score_mod import make_score_mod
from tests.parity.golden import load_golden
from tests.unit.attention.cases import num_lidar, sized

STAGES = {"bev": "keys of BEV windows", "cam": "keys of camera windows"}


@pytest.fixture(scope="module")
def golden():
    return load_golden("lam_windows")


def golden_layout(golden):
    rows, cols = golden["in/feat_hw"].tolist()
    bev_rows, bev_cols = golden["in/bev_hw"].tolist()
    # The published grid fills the point range.
    low, high = golden["in/pc_range"][:3].tolist(), golden["in/pc_range"][3:].tolist()
    cell_size = ((high[0] - low[0]) / bev_cols, (high[1] - low[1]) / bev_rows)
    lidar = Grid("lidar", 1, bev_rows, bev_cols, origin=tuple(low[:2]), cell_size=cell_size)
    return TokenLayout((lidar, Grid("camera", golden["in/lidar2img"].shape[1], rows, cols)))


def golden_settings(golden, **options):
    """Our settings for every pair of window sizes in the file, by the prefix of its arrays."""
    return {f"w{camera}_{bev}/": sized(bev, camera, **options) for camera, bev in golden.meta["windows"]}


def find_windows(golden, settings):
    return query_windows(
        golden.tensor("in/ref_points"),
        golden.tensor("in/lidar2img"),
        layout=golden_layout(golden),
        point_range=golden["in/pc_range"].tolist(),
        image_size=tuple(golden["in/img_hw"].tolist()),
        settings=settings,
    )


def is_on_far_border(golden):
    """(B, Q) bool: the queries of Q12, whose BEV row or column there is the size of the grid."""
    return (golden.tensor("pts_bev") == golden.tensor("in/bev_hw")).any(dim=-1)


def sorted_keys(is_key, width):
    """Token indices (B, Q, width) where `is_key` (B, Q, K), ascending, -1 behind them."""
    num_tokens = is_key.shape[-1]
    assert is_key.sum(dim=-1).max() <= width
    keys = torch.where(is_key, torch.arange(num_tokens), num_tokens).sort(dim=-1).values[..., :width]
    return torch.where(keys < num_tokens, keys, -1)


def scatter(tokens, is_valid, layout):
    """Whether a token (B, Q, K) is among `tokens` (B, Q, T) where valid; none may be there twice."""
    counts = torch.zeros(*tokens.shape[:2], layout.num_tokens).scatter_add(2, tokens, is_valid.float())
    assert counts.max() <= 1
    return counts > 0


def key_sets(windows):
    """Whether a token is in a query's window, (B, Q, K): as indices for a gather, and as the bias acts."""
    layout = windows.layout
    bev, camera = window_tokens(windows, 0), window_tokens(windows, 1)
    assert not scatter(*bev, layout)[..., num_lidar(layout) :].any()
    assert not scatter(*camera, layout)[..., : num_lidar(layout)].any()
    bias = AttentionBias(windows, torch.ones(*windows.batch_and_queries, 2))
    return {
        "gathered": scatter(*bev, layout) | scatter(*camera, layout),
        "in the bias, dense": dense_bias(bias) == 1,
        "in the bias, score_mod": bias_by_score_mod(bias) == 1,
        "in the bias, flex": inside_by_codes(windows),
    }


def bias_by_score_mod(bias):
    """What the score_mod adds to scores of 0, (B, Q, K): it takes indices of any shape that fit each other."""
    score_mod = make_score_mod(bias)
    batch_size, num_queries = bias.windows.batch_and_queries
    b, token = torch.arange(batch_size)[:, None, None], torch.arange(bias.windows.layout.num_tokens)
    blocks = torch.arange(num_queries)[:, None].split(100)
    return torch.cat([score_mod(torch.zeros(()), b, torch.tensor(0), q, token) for q in blocks], dim=1)


def inside_by_codes(windows):
    """Whether a token is in a window by the packed coordinates, (B, Q, K)."""
    layout = windows.layout
    packing = make_packing(layout, windows.settings)
    tokens = token_codes(layout, packing)
    inside = [is_inside(tokens, window_codes(windows, packing, g)[..., None], packing).any(dim=2) for g in range(2)]
    return inside[0] | inside[1]


def test_cells_and_cameras_equal_the_original(golden):
    settings = sized(5, 8, unseen="corner")
    windows = find_windows(golden, settings)
    regular = ~is_on_far_border(golden)
    expected = golden.tensor("pts_bev", torch.int64)
    golden.check_equal("BEV cells", windows.cells[0][:, :, 0, 1:][regular], expected[regular])
    expected = golden.tensor("pts_pers", torch.int64)
    golden.check_equal("camera cells, unseen points at the corner", windows.cells[1][:, :, 0], expected)


def test_windows_equal_the_original_key_by_key(golden):
    layout, regular = golden_layout(golden), ~is_on_far_border(golden)
    for prefix, settings in golden_settings(golden, unseen="corner").items():
        for how, is_key in key_sets(find_windows(golden, settings)).items():
            for name, is_part_key, queries in (
                ("bev", is_key[..., : num_lidar(layout)], regular),
                ("cam", is_key[..., num_lidar(layout) :], torch.ones_like(regular)),
            ):
                expected = golden.tensor(f"{prefix}{name}_keys", torch.int64)
                ours = sorted_keys(is_part_key, expected.shape[-1])
                golden.check_equal(f"{STAGES[name]}, {how}", ours[queries], expected[queries])
                counts = golden.tensor(f"{prefix}{name}_count", torch.int64)
                assert torch.equal(is_part_key.sum(dim=-1)[queries], counts[queries])


def test_a_point_on_the_far_border_keeps_the_window_of_the_last_cell(golden):
    # Q12. There the index row * columns + column is taken apart again, which moves column == columns to column 0 of
    # the next row; rows beyond the grid are lost.
    layout, special = golden_layout(golden), is_on_far_border(golden)
    if not special.any():
        pytest.skip("no query of lam_windows lies on the far border of the range")
    cells = golden.tensor("pts_bev", torch.int64)
    row, col = (cells[special][:, axis, None] for axis in (0, 1))
    there = torch.cat(((row * layout.grids[0].cols + col) // layout.grids[0].cols, col % layout.grids[0].cols), dim=-1)
    here = torch.cat((row.clamp(max=layout.grids[0].rows - 1), col.clamp(max=layout.grids[0].cols - 1)), dim=-1)
    assert (there != here).any(dim=-1).all()
    for prefix, settings in golden_settings(golden).items():
        expected = golden.tensor(f"{prefix}bev_keys", torch.int64)
        width = expected.shape[-1]
        original = sorted_keys(plain_window(there, settings.sizes["lidar"], layout), width)
        assert torch.equal(original, expected[special])
        ours = plain_window(here, settings.sizes["lidar"], layout)
        for how, is_key in key_sets(find_windows(golden, settings)).items():
            found = is_key[..., : num_lidar(layout)][special]
            assert torch.equal(found, ours), how


def plain_window(cells, size, layout):
    """Whether a BEV cell (N, H * W) is at most size // 2 from `cells` (N, 2) in row and in column."""
    cell, cols = torch.arange(num_lidar(layout)), layout.grids[0].cols
    row, col = cell // cols, cell % cols
    return ((row - cells[:, :1]).abs() <= size // 2) & ((col - cells[:, 1:]).abs() <= size // 2)


def test_a_point_that_no_camera_sees_has_no_window(golden):
    layout = golden_layout(golden)
    first = golden.tensor("first_valid_view")
    ours = find_windows(golden, sized(5, 8)).cells[1][:, :, 0, 0]
    golden.check_equal("first camera that sees a point, or none", ours, first)
    unseen = first < 0
    for prefix, settings in golden_settings(golden).items():
        for is_key in key_sets(find_windows(golden, settings)).values():
            ours = is_key[..., num_lidar(layout) :]
            assert not ours[unseen].any()
            expected = golden.tensor(f"{prefix}cam_keys", torch.int64)
            assert torch.equal(sorted_keys(ours, expected.shape[-1])[~unseen], expected[~unseen])


def test_every_camera_that_sees_a_point(golden):
    windows = find_windows(golden, sized(5, 8, camera_assignment="all"))
    is_seen = golden.tensor("fov_inds").transpose(1, 2)
    view = windows.cells[1][..., 0]
    golden.check_equal("all cameras that see a point", view >= 0, is_seen)
    assert torch.equal(view[is_seen], torch.arange(is_seen.shape[-1]).expand_as(view)[is_seen])
    # The window in the first of them is the published one.
    first = golden.tensor("first_valid_view")
    is_first = view == torch.where(first < 0, len(view[0, 0]), first)[..., None]
    expected = golden.tensor("pts_pers", torch.int64)[first >= 0]
    assert torch.equal(windows.cells[1][is_first], expected)
