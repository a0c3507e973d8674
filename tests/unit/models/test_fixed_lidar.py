"""Padded points -> BEV map at fixed sizes: the map of the branch, traced as one graph without a value being read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmt_aqr.models.fixed_lidar import encode_points_fixed, measure_sizes
from cmt_aqr.models.lidar import LidarBranch
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.voxels import pad_points
from tests.parity.golden import relative_error
from tests.unit.models.test_lidar import small_encoder

SIZE = 900


def make_branch(**changes):
    """A branch whose voxel grid is larger than the encoder's: the outer voxels count for nothing."""
    encoder = small_encoder(backend="torch")
    torch.manual_seed(1)
    settings = {"voxel_size": (0.5, 0.5, 0.5), "point_range": (-8.0, -6.0, -5.0, 8.0, 6.0, 5.5), "max_points": 10}
    settings |= {"max_voxels_train": 100, "max_voxels_test": 2000}
    backbone = SECOND(in_channels=encoder.output_shape[0], channels=(4, 6), layers=(1, 1), strides=(1, 2))
    neck = SECONDFPN(in_channels=(4, 6), channels=(3, 5), upsample_strides=(1, 2))
    branch = LidarBranch(**(settings | changes), encoder=encoder, backbone=backbone, neck=neck)
    return branch.double().eval()


def make_clouds():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    return [torch.randn(count, 5, generator=generator, dtype=torch.float64) * spread for count in (800, 0, 300)]


def padded(clouds):
    points = torch.empty(len(clouds), SIZE, 5, dtype=torch.float64)
    pad_points(clouds, points)
    return points


@pytest.mark.parametrize("max_voxels", [2000, 150])
def test_the_map_is_that_of_the_branch(max_voxels):
    branch, clouds = make_branch(max_voxels_test=max_voxels), make_clouds()
    with torch.no_grad():
        expected = branch(clouds)
        needed = measure_sizes(branch, padded(clouds))
        found, counts = encode_points_fixed(branch, padded(clouds), [n + 20 for n in needed])
        assert tuple(counts.tolist()) == needed
        assert needed[0] == len(branch.voxelize(clouds).features)
        assert relative_error(found, expected) <= 1e-12
        tight, _ = encode_points_fixed(branch, padded(clouds), needed)
        assert relative_error(tight, expected) <= 1e-12


def test_every_size_that_is_too_small_shows_in_its_count_and_in_the_map():
    branch, clouds = make_branch(), make_clouds()
    needed = measure_sizes(branch, padded(clouds))
    assert len(needed) == 4
    for level in range(len(needed)):
        too_small = [n - (i == level) for i, n in enumerate(needed)]
        with torch.no_grad():
            found, counts = encode_points_fixed(branch, padded(clouds), too_small)
        assert found.isnan().all()
        assert counts[level] == needed[level]


def test_one_graph_for_other_clouds():
    branch, clouds = make_branch(), make_clouds()
    sizes = [n + 50 for n in measure_sizes(branch, padded(clouds))]
    torch._dynamo.reset()

    def run(points):
        return encode_points_fixed(branch, points, sizes)

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for frames in (clouds, [clouds[1]] * 3, clouds[::-1]):
            found, _ = compiled(padded(frames))
            assert relative_error(found, branch(frames)) <= 1e-12
    torch._dynamo.reset()


def test_no_value_is_read():
    """With fake tensors, which have none, a size that depends on a value fails too."""
    branch = make_branch()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        points = torch.empty(2, SIZE, 5, dtype=torch.float64)
        found, counts = encode_points_fixed(branch, points, (500, 400, 300, 200))
    assert found.shape == (2, 8, *branch.encoder.output_shape[1:])
    assert counts.shape == (4,)
