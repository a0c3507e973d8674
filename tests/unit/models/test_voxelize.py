import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmt_aqr.models.voxels import pad_points, pad_voxels, voxel_grid_shape, voxelize, voxelize_batch, voxelize_fixed

SETTINGS = {"voxel_size": (0.5, 0.25, 1.0), "point_range": (-4.0, -3.0, -2.0, 4.0, 3.0, 2.0)}


def naive_voxelize(points, *, voxel_size, point_range, max_points, max_voxels):
    """The definition, one point after the other, in the arithmetic of numpy scalars."""
    depth, height, width = voxel_grid_shape(voxel_size=voxel_size, point_range=point_range)
    lower, size = (points.new_tensor(values) for values in (point_range[:3], voxel_size))
    members = {}
    for point in points:
        cell = ((point[:3] - lower) / size).floor()
        if not (
            point.isfinite().all() and (cell >= 0).all() and (cell < points.new_tensor((width, height, depth))).all()
        ):
            continue
        key = tuple(int(c) for c in cell.flip(0))
        if key not in members and len(members) == max_voxels:
            continue
        kept = members.setdefault(key, [])
        if len(kept) < max_points:
            kept.append(point)
    means = [torch.stack(kept).mean(dim=0) for kept in members.values()]
    return torch.stack(means), torch.tensor(list(members), dtype=torch.int32)


def random_points(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 5, generator=generator, dtype=dtype) * torch.tensor([2.5, 2.0, 1.0, 1.0, 1.0])
    points[::7] = points[0] + torch.rand(len(points[::7]), 5, generator=generator, dtype=dtype) * 0.1
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("max_points", "max_voxels"), [(10, 1000), (3, 1000), (10, 40), (1, 1)])
def test_equals_the_definition(dtype, max_points, max_voxels):
    points = random_points(400, seed=max_voxels, dtype=dtype)
    points[5, 0], points[6, 1], points[7, 3] = math.nan, math.inf, math.nan
    settings = SETTINGS | {"max_points": max_points, "max_voxels": max_voxels}
    features, coords = voxelize(points, **settings)
    expected_features, expected_coords = naive_voxelize(points, **settings)
    assert torch.equal(coords, expected_coords)
    torch.testing.assert_close(features, expected_features, rtol=0, atol=1e-6)
    assert features.dtype == dtype


def test_bounds_lower_inside_upper_outside():
    lower, upper = torch.tensor(SETTINGS["point_range"]).split(3)
    inside = torch.cat((lower, torch.tensor([0.5, 0.0])))
    points = inside.repeat(4, 1)
    for axis in range(3):
        points[axis + 1, axis] = upper[axis]
    features, coords = voxelize(points, **SETTINGS, max_voxels=10)
    assert coords.tolist() == [[0, 0, 0]]
    assert torch.equal(features, inside[None])


def test_is_repeatable_and_batches_clouds_one_after_the_other():
    clouds = [random_points(300, seed=1), torch.zeros(0, 5), random_points(200, seed=2), torch.full((4, 5), 1e9)]
    batch = voxelize_batch(clouds, **SETTINGS, max_voxels=100)
    assert batch.batch_size == 4
    again = voxelize_batch(clouds, **SETTINGS, max_voxels=100)
    assert torch.equal(batch.features, again.features)
    assert torch.equal(batch.coords_bzyx, again.coords_bzyx)
    assert batch.coords_bzyx.dtype == torch.int32
    for b, cloud in enumerate(clouds):
        features, coords = voxelize(cloud, **SETTINGS, max_voxels=100)
        rows = batch.coords_bzyx[:, 0] == b
        assert torch.equal(batch.features[rows], features)
        assert torch.equal(batch.coords_bzyx[rows, 1:], coords)
    assert sorted(batch.coords_bzyx[:, 0].tolist()) == batch.coords_bzyx[:, 0].tolist()


def padded(clouds, count):
    points = torch.empty(len(clouds), count, 5, dtype=clouds[0].dtype)
    pad_points(clouds, points)
    return points


CLOUDS = {
    "several frames": lambda: [random_points(300, seed=1), torch.zeros(0, 5), random_points(200, seed=2)],
    "no point": lambda: [torch.zeros(0, 5)],
    "one voxel": lambda: [torch.zeros(0, 5), torch.full((25, 5), 0.3)],
    "nothing inside": lambda: [torch.full((4, 5), 1e9), torch.full((3, 5), math.nan), torch.full((3, 5), -math.inf)],
}


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(("max_points", "max_voxels"), [(10, 1000), (3, 60)])
def test_fixed_sizes_give_the_same_voxels(max_points, max_voxels, cloud):
    settings = SETTINGS | {"max_points": max_points, "max_voxels": max_voxels}
    clouds = CLOUDS[cloud]()
    expected = voxelize_batch(clouds, **settings)
    found, count = voxelize_fixed(padded(clouds, 310), rows=400, **settings)
    assert count == len(expected.features)
    assert torch.equal(found.coords_bzyx, pad_voxels(expected, 400).coords_bzyx)
    torch.testing.assert_close(found.features[:count], expected.features, rtol=0, atol=1e-6)
    assert not found.features[count:].any()


def border_points():
    """Whole multiples of 0.1 m from the minimum of the range, and the two numbers beside each.

    There a division that is off by one ulp shows.
    """
    border = torch.arange(1080, dtype=torch.float64).mul(0.1).sub(54.0).float()
    x = torch.cat([border, border.nextafter(torch.tensor(100.0)), border.nextafter(torch.tensor(-100.0))])
    points = torch.zeros(len(x), 5)
    points[:, 0], points[:, 1] = x, x.flip(0)
    return points


def test_a_compiled_graph_gives_the_same_voxels_on_the_borders_of_cells_too():
    settings = {"voxel_size": (0.1, 0.1, 0.2), "point_range": (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)}
    settings |= {"max_points": 3, "max_voxels": 3000}
    clouds = [random_points(3000, seed=1), torch.zeros(0, 5), border_points()]
    expected = voxelize_batch(clouds, **settings)
    found, count = torch.compile(voxelize_fixed, fullgraph=True)(padded(clouds, 3500), rows=7000, **settings)
    assert count == len(expected.features) > 4000
    assert torch.equal(found.coords_bzyx, pad_voxels(expected, 7000).coords_bzyx)
    torch.testing.assert_close(found.features[:count], expected.features, rtol=0, atol=1e-6)


def test_too_few_rows_lose_the_last_voxels_and_say_how_many_there_are():
    clouds = [random_points(300, seed=1), random_points(200, seed=2)]
    expected = voxelize_batch(clouds, **SETTINGS, max_voxels=1000)
    needed = len(expected.features)
    found, count = voxelize_fixed(padded(clouds, 300), rows=needed - 5, **SETTINGS, max_voxels=1000)
    assert count == needed
    assert torch.equal(found.coords_bzyx, expected.coords_bzyx[:-5])
    exact, count = voxelize_fixed(padded(clouds, 300), rows=needed, **SETTINGS, max_voxels=1000)
    assert count == needed
    assert torch.equal(exact.coords_bzyx, expected.coords_bzyx)


def test_fixed_sizes_past_the_range_of_int32():
    settings = {"voxel_size": (1e-3, 1e-3, 1e-2), "point_range": (-4.0, -3.0, -2.0, 4.0, 3.0, 2.0)}
    clouds = [random_points(300, seed=3), random_points(100, seed=4)]
    expected = voxelize_batch(clouds, **settings, max_voxels=300)
    found, count = voxelize_fixed(padded(clouds, 320), rows=600, **settings, max_voxels=300)
    assert torch.equal(found.coords_bzyx[:count], expected.coords_bzyx)


def test_fixed_sizes_need_no_value_of_the_points():
    """A size that depends on a value, or a value that is read, fails with fake tensors."""
    with FakeTensorMode():
        found, count = voxelize_fixed(torch.empty(2, 50, 5), rows=30, **SETTINGS, max_voxels=20)
    assert found.features.shape == (30, 5) and found.coords_bzyx.shape == (30, 4) and count.shape == ()


def test_grids_past_the_range_of_int32():
    settings = {"voxel_size": (1e-3, 1e-3, 1e-2), "point_range": (-4.0, -3.0, -2.0, 4.0, 3.0, 2.0)}
    points = random_points(300, seed=3)
    features, coords = voxelize(points, **settings, max_voxels=300)
    expected_features, expected_coords = naive_voxelize(points, **settings, max_points=10, max_voxels=300)
    assert torch.equal(coords, expected_coords)
    torch.testing.assert_close(features, expected_features, rtol=0, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="at least one along each axis"):
        voxelize(torch.zeros(1, 5), voxel_size=(1, 1, 1), point_range=(0, 0, 0, 0.1, 5, 5), max_voxels=1)
    with pytest.raises(ValueError, match="at least one cloud"):
        voxelize_batch([], **SETTINGS, max_voxels=1)
    assert voxel_grid_shape(voxel_size=(0.1, 0.1, 0.2), point_range=(-54, -54, -5, 54, 54, 3)) == (40, 1080, 1080)
