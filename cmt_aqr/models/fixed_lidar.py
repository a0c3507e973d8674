"""The LiDAR branch at fixed sizes: padded points to the BEV map without waiting for the GPU, as one graph.

Shapes: B batch, P points, F features of a point, C channels, (H, W) cells along y and x.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cmt_aqr.models.lidar import LidarBranch
from cmt_aqr.models.voxels import VoxelBatch, voxelize_fixed


def _voxelize(branch: LidarBranch, points: Tensor, rows: int) -> tuple[VoxelBatch, Tensor]:
    return voxelize_fixed(
        points,
        voxel_size=branch.voxel_size,
        point_range=branch.point_range,
        max_points=branch.max_points,
        max_voxels=branch.max_voxels_train if branch.training else branch.max_voxels_test,
        rows=rows,
    )


def encode_points_fixed(branch: LidarBranch, points: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`LidarBranch.forward` with fixed sizes, always by the torch backend.

    Args:
        points: (B, P, F) metres, LiDAR frame; rows of NaN are padding (`voxels.pad_points`).
        sizes: rows kept for the voxels, then for the output of each strided convolution of the encoder.

    Returns:
        The map (B, C, H, W), NaN where a size was too small, and how large each size should be (int64, on the device;
        compare where the result is read). Equal to `forward` up to rounding.
    """
    voxels, count = _voxelize(branch, points, sizes[0])
    grid, counts = branch.encoder.encode_fixed(voxels, sizes[1:])
    grid = grid.masked_fill(count > sizes[0], math.nan)
    return branch.neck(branch.backbone(grid)), torch.cat((count[None], counts))


def measure_sizes(branch: LidarBranch, points: Tensor) -> tuple[int, ...]:
    """The sizes that these points (B, P, F) need; this waits for the GPU."""
    _, count = _voxelize(branch, points, 1)
    voxels, _ = _voxelize(branch, points, max(1, int(count)))
    return int(count), *branch.encoder.measure_rows(voxels)
