"""Token order: BEV row-major, then cameras (view, row, col)."""

import pytest

from cmt_aqr.attention import TokenLayout


def test_official_sizes():
    r50 = TokenLayout(bev_rows=128, bev_cols=128, num_views=6, pv_rows=20, pv_cols=50)
    vov = TokenLayout(bev_rows=180, bev_cols=180, num_views=6, pv_rows=40, pv_cols=100)
    assert (r50.num_bev, r50.num_pv, r50.num_tokens) == (16384, 6000, 22384)
    assert vov.num_tokens == 56400


def test_index_and_cell_are_inverse_on_unequal_sides():
    layout = TokenLayout(bev_rows=3, bev_cols=5, num_views=2, pv_rows=2, pv_cols=4)
    assert layout.bev_index(1, 2) == 7
    assert layout.pv_index(1, 0, 3) == 15 + 8 + 3
    for index in range(layout.num_tokens):
        view, row, col = layout.cell(index)
        back = layout.bev_index(row, col) if view < 0 else layout.pv_index(view, row, col)
        assert back == index


def test_one_sensor():
    assert TokenLayout(bev_rows=2, bev_cols=2).num_tokens == 4
    assert TokenLayout(num_views=6, pv_rows=2, pv_cols=2).cell(0) == (0, 0, 0)


def test_bad_sizes():
    with pytest.raises(ValueError, match="got neither"):
        TokenLayout()
    with pytest.raises(ValueError, match="must not be negative"):
        TokenLayout(bev_rows=-1, bev_cols=3)
    with pytest.raises(ValueError, match=r"outside \[0, 4\)"):
        TokenLayout(bev_rows=2, bev_cols=2).cell(4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2.0, 2), r"must be whole numbers, got \(2.0, 2, 0, 0, 0\)"),
        ((True, 2), "must be whole numbers"),
        ((0, 5, 6, 2, 2), r"the sizes of the BEV grid must be all 0 or none, got \(0, 5\)"),
        ((2, 2, 6, 0, 5), r"the sizes of the camera grid must be all 0 or none, got \(6, 0, 5\)"),
    ],
)
def test_grids_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(*sizes)
