"""A BEV window lies where the features of a point are: points through the real LiDAR branch of every configuration."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmt_aqr.aqr.window_tokens import window_tokens as tokens_of_windows
from cmt_aqr.attention import Grid, TokenLayout, WindowSettings, query_windows
from cmt_aqr.build import bev_cell_size, build_lidar_branch
from cmt_aqr.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
# Configurations by the LiDAR branch that they have: each branch is run once.
BRANCHES = {}
for path in sorted(CONFIGS.rglob("*.yaml")):
    model = load_config(path).model
    if model.lidar is not None:
        BRANCHES.setdefault((model.lidar, model.point_range), []).append(str(path.relative_to(CONFIGS)))


def make_branch(lidar, point_range):
    """The branch in evaluation mode, all weights positive: a point adds a bump to the map that fades with the distance.

    The first layer reads the intensity alone, so that the bump does not depend on where the point is, and the layers
    behind the sparse encoder have their centre tap alone: their zero padding would move a bump away from a border.
    """
    torch.manual_seed(0)
    num_levels = len(lidar.second_channels)
    # Few channels: the widths move nothing and take the time.
    narrow = replace(lidar, second_channels=(8,) * num_levels, neck_channels=(4,) * num_levels)
    branch = build_lidar_branch(narrow, point_range).eval()
    for parameter in branch.parameters():
        parameter.data.abs_()
    branch.encoder.conv_input[0].weight.data[..., :3] = 0
    for module in branch.backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    return branch


def clouds_of(points):
    """One cloud of one point of intensity 1 for each of points (N, 2), on the ground plane of the LiDAR."""
    return [torch.tensor([[x, y, 0.0, 1.0, 0.0]]) for x, y in points.tolist()]


def window_tokens(points, lidar, point_range, rows, cols):
    """Tokens (N, T) of the windows of points (N, 2), -1 for those that are not there."""
    low, high = torch.tensor(point_range, dtype=torch.float64).chunk(2)
    metres = torch.cat((points, torch.zeros_like(points[:, :1])), dim=1)
    grid = Grid("lidar", 1, rows, cols, origin=point_range[:2], cell_size=bev_cell_size(lidar))
    windows = query_windows(
        ((metres - low) / (high - low))[None],
        None,
        layout=TokenLayout((grid,)),
        point_range=point_range,
        image_size=None,
        settings=WindowSettings({"lidar": 5}),
    )
    tokens, is_valid = tokens_of_windows(windows, 0)
    return torch.where(is_valid, tokens, -1)[0]


def covered(lidar):
    """Metres along x, y that the sparse grid covers."""
    return torch.tensor([lidar.voxel_size[i] * lidar.sparse_shape[2 - i] for i in range(2)], dtype=torch.float64)


@pytest.mark.parametrize(("lidar", "point_range"), BRANCHES, ids=[names[0] for names in BRANCHES.values()])
def test_the_strongest_cell_lies_in_the_window(lidar, point_range):
    branch = make_branch(lidar, point_range)
    # The middle, near every border of the grid, and between.
    shares = torch.tensor(
        [[0.5, 0.5], [0.004, 0.004], [0.004, 0.996], [0.996, 0.004], [0.996, 0.996], [0.27, 0.78]], dtype=torch.float64
    )
    points = torch.tensor(point_range[:2]) + shares * covered(lidar)
    with torch.no_grad():
        bev_map = torch.cat([branch([cloud]).sum(dim=1) for cloud in clouds_of(points)])
    tokens = window_tokens(points, lidar, point_range, *bev_map.shape[1:])
    strongest = bev_map.flatten(1).argmax(dim=1)
    is_found = (tokens == strongest[:, None]).any(dim=1)
    assert is_found.all(), points[~is_found]


def test_a_point_beyond_the_grid_has_neither_features_nor_a_window():
    # Q13: the grid of this preset ends at 48.4 m, its range at 54 m.
    config = load_config(CONFIGS / "cmt_aqr_r50_800x320.yaml").model
    assert (torch.tensor(config.point_range[:2]) + covered(config.lidar)).tolist() == pytest.approx([48.4, 48.4])
    branch = make_branch(config.lidar, config.point_range)
    points = torch.tensor([[49.0, 0.0], [0.0, 52.0], [53.9, 53.9], [48.3, 48.3]], dtype=torch.float64)
    with torch.no_grad():
        encoded = branch.encoder(branch.voxelize(clouds_of(points)))
    tokens = window_tokens(points, config.lidar, config.point_range, *encoded.shape[2:])
    assert encoded.flatten(1).any(dim=1).tolist() == (tokens >= 0).any(dim=1).tolist() == [False, False, False, True]
