"""Token order: grid after grid, each by view, row and column."""

import pytest

from cmt_aqr.attention import Grid, TokenLayout
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import LAYOUTS, cell_of_token


def test_official_sizes():
    r50 = fusion_layout((128, 128), (6, 20, 50))
    vov = fusion_layout((180, 180), (6, 40, 100))
    assert ([grid.num_tokens for grid in r50.grids], r50.num_tokens) == ([16384, 6000], 22384)
    assert (vov.num_tokens, vov.padded_length) == (56400, 441 * 128)
    assert r50.token_range(0) == (0, 16384) and r50.token_range(1) == (16384, 22384)


def test_index_and_table_are_inverse_on_unequal_sides():
    layout = TokenLayout((Grid("lidar", 1, 3, 5), Grid("camera", 2, 2, 4), Grid("radar", 1, 2, 3)))
    assert layout.index(0, 0, 1, 2) == 7
    assert layout.index(1, 1, 0, 3) == 15 + 8 + 3
    assert layout.index(2, 0, 1, 1) == 15 + 16 + 4
    table = layout.table()
    assert table[:, 15 + 8 + 3].tolist() == [1, 1, 0, 3]
    assert [layout.index(*cell) for cell in table.T.tolist()] == list(range(37))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_table_by_counting(layout):
    expected = [list(cell_of_token(layout, index)) for index in range(layout.num_tokens)]
    assert layout.table().T.tolist() == expected


def test_one_sensor():
    assert fusion_layout((2, 2), None).num_tokens == 4
    assert fusion_layout(None, (6, 2, 2)).table()[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ((), r"at least one grid, each with a name of its own, got names \[\]"),
        ((Grid("a", 1, 2, 2), Grid("a", 1, 2, 2)), r"got names \['a', 'a'\]"),
    ],
)
def test_layouts_that_cannot_be(grids, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(grids)


@pytest.mark.parametrize("sizes", [(1, 2.0, 2), (1, True, 2), (0, 2, 2), (6, 0, 5), (1, 2, -1)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="rows, cols of the grid 'x' must be whole numbers above 0, got"):
        Grid("x", *sizes)


@pytest.mark.parametrize(
    ("views", "origin", "cell_size"),
    [
        (2, (0.0, 0.0), (1.0, 1.0)),
        (1, None, (1.0, 1.0)),
        (1, (0.0, 0.0), None),
        (1, (0.0, 0.0), (0.5,)),
        (1, (0.0, 0.0), (0.0, 1.0)),
        (1, (0.0, 0.0), (1.0, -1.0)),
        (1, (0.0, 0.0), (float("nan"), 1.0)),
        (1, (0.0, 0.0), (1.0, float("inf"))),
    ],
)
def test_bev_grids_that_cannot_be(views, origin, cell_size):
    with pytest.raises(
        ValueError, match=r"^the BEV grid 'x' needs one view, and the metres along x and y of its origin"
    ):
        Grid("x", views, 4, 4, origin=origin, cell_size=cell_size)
