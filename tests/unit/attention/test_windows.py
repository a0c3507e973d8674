"""Windows: cells of reference points, choice of cameras, tokens of a window; against loops and by hand."""

import itertools
import math
from fractions import Fraction
from functools import partial

import pytest
import torch

from cmt_aqr import geometry
from cmt_aqr.aqr.window_tokens import window_tokens
from cmt_aqr.attention import AttentionBias, TokenLayout, WindowSettings, query_windows
from cmt_aqr.attention.dense import dense_bias
from cmt_aqr.attention.windows import MIN_DEPTH, camera_cells, cells_of
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import LAYOUTS, RADAR, inside_by_loops, random_windows, sized

# Reference points are metres / 16 here, so that numbers can be chosen that are exact in every dtype.
RANGE = (0.0, 0.0, 0.0, 16.0, 16.0, 16.0)
CENTRED = (-54.0, -40.0, -5.0, 54.0, 48.0, 3.0)
IMAGE_SIZE = (32, 48)
# Along +z from the origin: u d = 8 x + 24 z, v d = 8 y + 16 z, d = z.
AHEAD = [[8.0, 0, 24, 0], [0, 8, 16, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def camera(*, at=(0.0, 0.0, 0.0)):
    """The camera AHEAD moved to another place."""
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = -torch.tensor(at)
    return torch.tensor(AHEAD, dtype=torch.float64) @ shift


def ring(num_views, *, width_degrees, batch=1):
    """lidar2img (batch, V, 4, 4) of cameras around the origin, 1.5 m up; they overlap where they are wide enough."""
    height, width = IMAGE_SIZE
    focal = width / 2 / math.tan(math.radians(width_degrees / 2))
    inner = torch.tensor([[focal, 0, width / 2, 0], [0, focal, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    matrices = []
    for view in range(num_views):
        angle = 0.3 + 2 * math.pi * view / num_views
        cos, sin = math.cos(angle), math.sin(angle)
        outer = torch.tensor([[sin, -cos, 0, 0.2], [0, 0, -1, 1.5], [cos, sin, 0, -0.4], [0, 0, 0, 1]]).double()
        matrices.append(inner @ outer)
    return torch.stack(matrices).expand(batch, -1, -1, -1).clone()


layout_of = partial(fusion_layout, point_range=RANGE)
BOTH = layout_of((5, 7), (3, 4, 6))


def find(
    points, lidar2img=None, *, layout=BOTH, point_range=RANGE, image_size=IMAGE_SIZE, lidar=5, camera_size=8, **options
):
    """query_windows of points in metres (Q, 3), for one sample."""
    low, high = torch.tensor(point_range, dtype=torch.float64).chunk(2)
    unit = (torch.as_tensor(points, dtype=torch.float64) - low) / (high - low)
    lidar2img = camera().expand(1, layout.grids[-1].views, 4, 4) if lidar2img is None else lidar2img
    return query_windows(
        unit[None],
        lidar2img,
        layout=layout,
        point_range=point_range,
        image_size=image_size,
        settings=sized(lidar, camera_size, **options),
    )


def centred_windows(points, lidar2img, layout, **options):
    """query_windows of points (B, Q, 3) in the unit cube of the range CENTRED."""
    return query_windows(
        points,
        lidar2img,
        layout=layout,
        point_range=CENTRED,
        image_size=IMAGE_SIZE,
        settings=sized(5, 8, **options),
    )


def cells_by_loops(unit, lidar2img, layout, point_range, image_size):
    """BEV cell, and for every view the camera cell or None, of one reference point; scalar arithmetic."""
    metres = [u * (point_range[axis + 3] - point_range[axis]) + point_range[axis] for axis, u in enumerate(unit)]
    lidar, cameras = layout.grids
    row, col = (math.floor((metres[axis] - lidar.origin[axis]) / lidar.cell_size[axis]) for axis in (1, 0))
    bev = [0, row, col] if 0 <= row < lidar.rows and 0 <= col < lidar.cols else [-1, 0, 0]
    views = []
    for matrix in lidar2img.tolist():
        ud, vd, d = (sum(m * x for m, x in zip(row, [*metres, 1.0], strict=True)) for row in matrix[:3])
        u, v = ud / max(d, MIN_DEPTH), vd / max(d, MIN_DEPTH)
        if d > 0 and 0 <= u < image_size[1] and 0 <= v < image_size[0]:
            cell = math.floor(v / image_size[0] * cameras.rows), math.floor(u / image_size[1] * cameras.cols)
            views.append(cell)
        else:
            views.append(None)
    return bev, views


@pytest.mark.parametrize("unseen", ("none", "corner"))
@pytest.mark.parametrize("assignment", ("first", "all"))
def test_cells_equal_loops(assignment, unseen):
    cell_size = (11.5, 14.0)  # 9 columns of 11.5 m leave 4.5 m of the range without cells, 6 rows of 14 m 4 m
    layout = layout_of((6, 9), (4, 8, 12), point_range=CENTRED, cell_size=cell_size)
    lidar2img = ring(4, width_degrees=110, batch=2)
    lidar2img[1, :, :2] *= 1.1
    points = torch.rand(2, 80, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    points[:, 60:, :2] = 0.475 + points[:, 60:, :2] / 20  # above and below the cameras
    windows = centred_windows(points, lidar2img, layout, camera_assignment=assignment, unseen=unseen)
    seen_by, beyond = [], 0
    for b, q in itertools.product(range(2), range(80)):
        bev, views = cells_by_loops(points[b, q].tolist(), lidar2img[b], layout, CENTRED, IMAGE_SIZE)
        assert windows.cells[0][b, q].tolist() == [bev]
        beyond += bev[0] < 0
        found = [[view, *cell] for view, cell in enumerate(views) if cell is not None]
        if assignment == "first":
            expected = found[:1] or [[-1, 0, 0]]
        else:
            expected = [[-1, 0, 0] if cell is None else [view, *cell] for view, cell in enumerate(views)]
        if unseen == "corner" and not found:
            expected[0] = [0, 0, 0]
        assert windows.cells[1][b, q].tolist() == expected
        seen_by.append(len(found))
    assert set(seen_by) == {0, 1, 2}
    assert 0 < beyond < 40


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("assignment", ("first", "all"))
@pytest.mark.parametrize(("bev", "camera_size"), ((1, 2), (2, 1), (3, 4), (4, 3), (5, 8), (15, 15)))
def test_tokens_of_windows_equal_loops(layout, assignment, bev, camera_size):
    settings = sized(bev, camera_size, camera_assignment=assignment)
    windows = random_windows(layout, settings, queries=30)
    expected = inside_by_loops(windows)
    found = torch.zeros_like(expected, dtype=torch.int64)
    for number, grid in enumerate(layout.grids):
        tokens, is_valid = window_tokens(windows, number)
        size, per_query = settings.sizes[grid.name], windows.cells[number].shape[2]
        assert per_query == (3 if (grid.name, assignment) == ("camera", "all") else 1)
        assert tokens.shape == is_valid.shape == (2, 30, per_query * (size + 1 - size % 2) ** 2)
        assert torch.equal(tokens * ~is_valid, torch.zeros_like(tokens))
        found.scatter_add_(2, tokens, is_valid.long())
    assert torch.equal(found, expected.long())
    bias = AttentionBias(windows, torch.ones(2, 30, len(layout.grids)))
    assert torch.equal(dense_bias(bias), expected.float())


def test_windows_do_not_wrap_into_the_next_row_or_view():
    layout = layout_of((4, 4), (2, 3, 3))
    windows = find([[15.9, 0.1, 1.0]], layout=layout, image_size=(48, 48), lidar=3)
    tokens, is_valid = window_tokens(windows, 0)
    assert tokens[0, 0][is_valid[0, 0]].tolist() == [2, 3, 6, 7]
    # Last cell of view 0.
    windows = find([[2.9, 3.9, 1.0]], layout=layout, image_size=(48, 48), camera_size=2)
    assert windows.cells[1][0, 0].tolist() == [[0, 2, 2]]
    tokens, is_valid = window_tokens(windows, 1)
    assert tokens[0, 0][is_valid[0, 0]].tolist() == [16 + 4, 16 + 5, 16 + 7, 16 + 8]


def test_rows_follow_y_and_columns_x():
    windows = find([[3.0, 12.0, 1.0]], layout=layout_of((8, 4), None))
    assert windows.cells[0].tolist() == [[[[0, 6, 0]]]]
    # Pixel (24 + 8, 16 + 4): column 32 / 8, row 20 / 8.
    windows = find([[1.0, 0.5, 1.0]], layout=layout_of(None, (1, 4, 6)))
    assert windows.cells[0].tolist() == [[[[0, 2, 4]]]]


def test_borders_of_the_range():
    points = [
        [0.0, 0.0, 1.0],
        [16.0, 16.0, 1.0],
        [16.0, 4.0, 1.0],
        [4.0, 12.0, 1.0],
        [-0.01, 15.0, 1.0],
        [9.0, 16.01, 1.0],
    ]
    windows = find(points, layout=layout_of((4, 8), None))
    expected = [[0, 0, 0], [0, 3, 7], [0, 1, 7], [0, 3, 2], [-1, 0, 0], [-1, 0, 0]]
    assert windows.cells[0][0, :, 0].tolist() == expected


def test_bev_cells_are_metric_and_end_with_the_grid():
    # Q13: 4 x 4 cells of 3.5 m cover 14 m of a range of 16 m. If they were stretched over the range, the cell of
    # (3.6, 13.9) would be (3, 0).
    points = [
        [3.6, 13.9, 1.0],
        [12.5, 3.4, 1.0],
        [14.0, 14.0, 1.0],
        [14.01, 1.0, 1.0],
        [1.0, 15.9, 1.0],
        [7.0, 0.0, 1.0],
    ]
    windows = find(points, layout=layout_of((4, 4), None, cell_size=(3.5, 3.5)))
    expected = [[0, 3, 1], [0, 0, 3], [0, 3, 3], [-1, 0, 0], [-1, 0, 0], [0, 0, 2]]
    assert windows.cells[0][0, :, 0].tolist() == expected
    _, is_valid = window_tokens(windows, 0)
    assert is_valid.any(dim=-1)[0].tolist() == [True, True, True, False, False, True]
    # What lies beyond the grid stands to no token, whatever is near token 0.
    assert inside_by_loops(windows)[0, 3:5].sum() == 0
    assert dense_bias(AttentionBias(windows, torch.ones(1, 6, 1)))[0, 3:5].abs().max() == 0


def test_points_that_are_not_finite_have_no_window():
    points = torch.tensor([[[math.nan, 0.5, 0.5], [math.inf, 0.5, 0.5], [1e30, 0.5, 0.5], [0.5, 0.5, 0.5]]])
    layout = layout_of((4, 4), None)
    windows = query_windows(points, None, layout=layout, point_range=RANGE, image_size=None, settings=sized())
    assert windows.cells[0][0, :, 0].tolist() == [[-1, 0, 0]] * 3 + [[0, 2, 2]]


def test_borders_of_an_image():
    # u = 24 + 8 x / z, v = 16 + 8 y / z.
    points = [
        [-3.0, 0, 1],
        [3, 0, 1],
        [2.999, 0, 1],
        [-3.001, 0, 1],
        [0, -2, 1],
        [0, 2, 1],
        [0, 1.999, 1],
        [0, -2.001, 1],
    ]
    windows = find(points, layout=layout_of(None, (1, 4, 6)))
    expected = [[0, 2, 0], [-1, 0, 0], [0, 2, 5], [-1, 0, 0], [0, 0, 3], [-1, 0, 0], [0, 3, 3], [-1, 0, 0]]
    assert windows.cells[0][0, :, 0].tolist() == expected
    # A point on the line between two cells belongs to the second.
    windows = find([[-2.0, -1, 1], [-2.001, -1.001, 1]], layout=layout_of(None, (1, 4, 6)))
    assert windows.cells[0][0, :, 0].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_a_pixel_that_rounds_up_to_the_border_stays_in_the_last_cell():
    width = torch.tensor(48.0, dtype=torch.float64)
    below = torch.nextafter(width, torch.zeros_like(width))
    assert cells_of(torch.stack((below / width, width / width)), 6).tolist() == [5, 5]


def test_a_point_behind_a_camera_is_not_seen():
    layout = layout_of(None, (1, 4, 6))
    # Divided by its own depth, the second one would be at pixel (24, 16) too.
    points = [[0.0, 0, 2], [0, 0, -2], [0, 0, 0]]
    assert find(points, layout=layout).cells[0][0, :, 0, 0].tolist() == [0, -1, -1]
    # Not even where the product with the depth is a pixel itself: u d = 24 z + 30, v d = 16 z + 20.
    lidar2img = torch.tensor(AHEAD, dtype=torch.float64)
    lidar2img[:2, 3] = torch.tensor([30.0, 20.0]) * MIN_DEPTH
    depths = [[0.0, 0, -MIN_DEPTH / 2], [0, 0, 0]]
    assert find(depths, lidar2img[None, None], layout=layout).cells[0][0, :, 0, 0].tolist() == [-1, -1]


def test_depths_are_clipped_before_the_division():
    # Q11: a pixel of u d / d = 40, but u d / MIN_DEPTH = 4.
    assert MIN_DEPTH == 1e-5
    layout = layout_of(None, (1, 4, 6))
    lidar2img = torch.tensor([[0.0, 0, 40, 0], [0, 0, 24, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()[None, None]
    windows = find([[0.0, 0, MIN_DEPTH / 10], [0, 0, MIN_DEPTH * 2]], lidar2img, layout=layout)
    assert windows.cells[0][0, :, 0].tolist() == [[0, 0, 0], [0, 3, 5]]


def test_the_first_camera_in_order_wins():
    layout = layout_of(None, (3, 4, 6))
    # View 0 is 40 m away to the side; views 1 and 2 see the point, view 2 nearer to its centre.
    lidar2img = torch.stack((camera(at=(40, 0, 0)), camera(at=(-2, 0, 0)), camera(at=(0, 0, 0))))[None]
    points = [[0.0, 0, 1]]
    assert find(points, lidar2img, layout=layout).cells[0].tolist() == [[[[1, 2, 5]]]]
    every = find(points, lidar2img, layout=layout, camera_assignment="all").cells[0]
    assert every.tolist() == [[[[-1, 0, 0], [1, 2, 5], [2, 2, 3]]]]


def test_a_point_that_no_camera_sees():
    layout = layout_of(None, (2, 4, 6))
    points = [[0.0, 0, -1], [0, 0, 1]]
    nothing = [-1, 0, 0]
    cases = {
        ("first", "none"): [[nothing], [[0, 2, 3]]],
        ("first", "corner"): [[[0, 0, 0]], [[0, 2, 3]]],
        ("all", "none"): [[nothing, nothing], [[0, 2, 3], [1, 2, 3]]],
        ("all", "corner"): [[[0, 0, 0], nothing], [[0, 2, 3], [1, 2, 3]]],
    }
    for (assignment, unseen), expected in cases.items():
        windows = find(points, layout=layout, camera_assignment=assignment, unseen=unseen)
        assert windows.cells[0][0].tolist() == expected, (assignment, unseen)
    # The corner is a full window of camera 0, no window is no token at all.
    windows = find(points, layout=layout, unseen="corner", camera_size=2)
    assert inside_by_loops(windows)[0, 0].nonzero().flatten().tolist() == [0, 1, 6, 7]
    _, is_valid = window_tokens(find(points, layout=layout), 0)
    assert not is_valid[0, 0].any() and is_valid[0, 1].any()


def test_a_view_that_sees_the_point_later_in_the_order_is_not_moved_to_the_corner():
    layout = layout_of(None, (2, 4, 6))
    lidar2img = torch.stack((camera(at=(40, 0, 0)), camera()))[None]
    windows = find([[0.0, 0, 1]], lidar2img, layout=layout, camera_assignment="all", unseen="corner")
    assert windows.cells[0].tolist() == [[[[-1, 0, 0], [1, 2, 3]]]]


def test_float32_points_get_the_cells_of_their_exact_values():
    # Cell borders rounded to float32 lie on either side of the border; float32 arithmetic rounds some of them onto it.
    cells = 180
    points = torch.arange(cells, dtype=torch.float32)[:, None].expand(-1, 3) / cells
    layout = layout_of((cells, cells), (4, 8, 12), point_range=CENTRED)
    calls = [
        query_windows(
            p[None],
            lidar2img.to(p.dtype),
            layout=layout,
            point_range=CENTRED,
            image_size=IMAGE_SIZE,
            settings=sized(5, 8, camera_assignment="all"),
        )
        for lidar2img in [ring(4, width_degrees=110).float()]
        for p in (points, points.double())
    ]
    exact = [math.floor(Fraction(value) * cells) for value in points[:, 0].tolist()]
    assert calls[0].cells[0][0].tolist() == [[[0, cell, cell]] for cell in exact]
    assert torch.floor(points[:, 0] * cells).long().tolist() != exact
    assert torch.equal(calls[0].cells[0], calls[1].cells[0])
    assert torch.equal(calls[0].cells[1], calls[1].cells[1])


def test_float64_calibration_is_not_rounded_to_the_dtype_of_the_points():
    # The pixel of the point lies 1e-10 in front of a cell's border.
    lidar2img = torch.tensor(AHEAD, dtype=torch.float64).expand(1, 1, 4, 4).clone()
    lidar2img[..., 0, 2] -= 1e-10
    points = torch.tensor([[[0.25, 0.5, 0.5]]])
    windows = query_windows(
        points,
        lidar2img,
        layout=layout_of(None, (1, 4, 6)),
        point_range=(-4.0, -1.0, 0.0, 4.0, 1.0, 2.0),
        image_size=IMAGE_SIZE,
        settings=sized(),
    )
    assert windows.cells[0].tolist() == [[[[0, 2, 0]]]]


def test_no_gradient_passes():
    points = torch.rand(1, 3, 3, requires_grad=True)
    windows = query_windows(
        points,
        camera().expand(1, 3, 4, 4),
        layout=BOTH,
        point_range=RANGE,
        image_size=IMAGE_SIZE,
        settings=sized(),
    )
    assert not windows.cells[0].requires_grad and not windows.cells[1].requires_grad


def test_one_sensor():
    windows = find([[1.0, 1, 1]] * 4, layout=LAYOUTS["camera"])
    assert [x.shape for x in windows.cells] == [(1, 4, 1, 3)] and windows.batch_and_queries == (1, 4)
    points = torch.rand(2, 5, 3)
    layout = LAYOUTS["lidar"]
    windows = query_windows(points, None, layout=layout, point_range=RANGE, image_size=None, settings=sized())
    assert len(windows.cells) == 1 and windows.batch_and_queries == (2, 5)


def test_a_third_grid_has_its_own_origin_and_cells():
    # RADAR begins at (-44, -44), 4 columns of 22 m and 3 rows of 29 m: it ends at (44, 43).
    layout = TokenLayout((*layout_of((5, 7), (3, 4, 6), point_range=CENTRED).grids, RADAR))
    points = [[-44.1, 0.0, 1.0], [-43.9, -39.0, 1.0], [0.5, 15.0, 1.0], [44.0, 43.0, 1.0], [0.0, 43.1, 1.0]]
    windows = find(points, layout=layout, point_range=CENTRED, lidar2img=camera().expand(1, 3, 4, 4))
    expected = [[-1, 0, 0], [0, 0, 0], [0, 2, 2], [0, 2, 3], [-1, 0, 0]]
    assert windows.cells[2][0, :, 0].tolist() == expected
    two = find(points, layout=TokenLayout(layout.grids[:2]), point_range=CENTRED)
    assert all(torch.equal(*pair) for pair in zip(windows.cells[:2], two.cells, strict=True))


def test_projection_is_the_one_of_geometry():
    # The formulas stand twice because this folder must work alone.
    layout = layout_of((6, 9), (4, 8, 12), point_range=CENTRED)
    cameras = layout.grids[1]
    lidar2img = ring(4, width_degrees=110, batch=2)
    points = torch.rand(2, 200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    scaled, depth = geometry.project(geometry.to_metres(points, CENTRED), lidar2img)
    pixels = scaled / depth.clamp(min=MIN_DEPTH)[..., None]
    unit = pixels / torch.tensor(IMAGE_SIZE[::-1])
    is_seen = ((depth > 0) & (unit >= 0).all(dim=-1) & (unit < 1).all(dim=-1)).transpose(1, 2)
    sizes = (cameras.cols, cameras.rows)
    col, row = (torch.floor(unit[..., axis] * sizes[axis]).long().transpose(1, 2) for axis in (0, 1))
    ours, ours_seen = camera_cells(geometry.to_metres(points, CENTRED), lidar2img, IMAGE_SIZE, cameras)
    assert torch.equal(ours_seen, is_seen)
    assert torch.equal(ours[is_seen], torch.stack((row, col), dim=-1)[is_seen])
    windows = centred_windows(points, lidar2img, layout, camera_assignment="all")
    assert torch.equal(windows.cells[1][..., 0] >= 0, is_seen)
    assert torch.equal(windows.cells[1][is_seen][:, 1:], ours[is_seen])


@pytest.mark.parametrize("entry", (slice(None), (0, 3), (2, 0), (2, 3), (3, 3)))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_a_view_without_a_finite_calibration_sees_nothing(bad, entry):
    # What a GPU does, where looking at the values would mean to wait.
    lidar2img = ring(2, width_degrees=170)[:, :, None].flatten(1, 2)
    lidar2img[0, 0][entry] = bad
    layout = layout_of(None, (2, 4, 6))
    points = torch.rand(1, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 20 - 10
    cells, is_seen = camera_cells(points, lidar2img, IMAGE_SIZE, layout.grids[0])
    assert not is_seen[..., 0].any() and is_seen[..., 1].any()
    assert torch.equal(cells[..., 0, :], torch.zeros_like(cells[..., 0, :]))


@pytest.mark.parametrize("size", (0, -3, 2.5, 5.0, True, "5", None))
@pytest.mark.parametrize("name", ("lidar", "camera"))
def test_bad_window_sizes(name, size):
    with pytest.raises(ValueError, match=f"^the {name} window must be a positive whole number of cells, got {size!r}$"):
        WindowSettings({name: size})


def test_bad_point_ranges():
    layout = layout_of((4, 4), None)
    for point_range in ((-1, -1, 1, 1), (1, -1, -1, -1, 1, 1)):
        with pytest.raises(ValueError, match=r"^point_range must be x, y, z from and x, y, z to in metres, got"):
            query_windows(
                torch.rand(1, 2, 3),
                None,
                layout=layout,
                point_range=point_range,
                image_size=None,
                settings=sized(),
            )


def test_unknown_choices():
    with pytest.raises(ValueError, match=r"^camera_assignment must be one of first, all, got 'nearest'$"):
        sized(5, 8, camera_assignment="nearest")
    with pytest.raises(ValueError, match=r"^unseen must be one of none, corner, got 'centre'$"):
        sized(5, 8, unseen="centre")


def test_sizes_of_windows():
    reach = {size: WindowSettings({"lidar": 3, "camera": size}) for size in (1, 2, 5, 8, 15)}
    assert {size: s.radius(BOTH.grids[1]) for size, s in reach.items()} == {1: 0, 2: 1, 5: 2, 8: 4, 15: 7}
    assert {s.radius(BOTH.grids[0]) for s in reach.values()} == {1}


def test_a_grid_without_a_window_size_is_refused():
    message = r"^grids \['lidar', 'camera'\] need a tensor of cells and a window size each, got 2 tensors and sizes for"
    with pytest.raises(ValueError, match=message):
        query_windows(
            torch.rand(1, 2, 3),
            camera().expand(1, 3, 4, 4),
            layout=BOTH,
            point_range=RANGE,
            image_size=IMAGE_SIZE,
            settings=WindowSettings({"lidar": 5, "radar": 3}),
        )


def bad_inputs():
    points, lidar2img = torch.rand(2, 5, 3), ring(3, width_degrees=90, batch=2)
    not_finite = lidar2img.clone()
    not_finite[1, 2, 0, 3] = float("nan")
    good = {"reference_points": points, "lidar2img": lidar2img, "layout": BOTH, "image_size": IMAGE_SIZE}
    good["settings"] = sized()
    cases = {
        "two dimensions": (
            {"reference_points": points[0]},
            r"reference_points must have shape \(B, Q, 3\), got \(5, 3\)",
        ),
        "four coordinates": ({"reference_points": torch.rand(2, 5, 4)}, r"\(B, Q, 3\), got \(2, 5, 4\)"),
        "no calibration": (
            {"lidar2img": None},
            r"lidar2img must have shape \(2, 3, 4, 4\) for the grid 'camera', got None",
        ),
        "a view too few": (
            {"lidar2img": lidar2img[:, :2]},
            r"shape \(2, 3, 4, 4\) for the grid 'camera', got \(2, 2, 4, 4\)",
        ),
        "another batch": (
            {"lidar2img": lidar2img[:1]},
            r"for the grid 'camera', got \(1, 3, 4, 4\)",
        ),
        "3 x 4": (
            {"lidar2img": lidar2img[:, :, :3]},
            r"for the grid 'camera', got \(2, 3, 3, 4\)",
        ),
        "no image": ({"image_size": None}, "image_size must be the height and width in pixels, got None"),
        "empty image": ({"image_size": (0, 48)}, r"image_size must be the height and width in pixels, got \(0, 48\)"),
        "wide cells": (
            {"image_size": (32, 54)},
            "camera grids of 4 x 6 cells do not fit images of 32 x 54 pixels: a cell must be square",
        ),
        "not finite": ({"lidar2img": not_finite}, "lidar2img holds values that are not finite"),
    }
    return good, cases


@pytest.mark.parametrize("name", bad_inputs()[1])
def test_bad_inputs(name):
    good, cases = bad_inputs()
    change, message = cases[name]
    query_windows(**good, point_range=RANGE)
    with pytest.raises(ValueError, match=message):
        query_windows(**(good | change), point_range=RANGE)
