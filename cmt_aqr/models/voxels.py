"""Hard voxelisation of point clouds.

Shapes: B batch, P points, S voxels, F features of a point (x, y, z first, metres, LiDAR frame).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

INT32_MAX = 2**31 - 1


class VoxelBatch(NamedTuple):
    """Voxels of a batch of frames.

    features (S, F): mean of the kept points of each voxel.
    coords_bzyx (S, 4) int32: frame index, then cell (z, y, x). Frames follow each other.
    batch_size: number of frames; a frame without points has no row, so it cannot be read from the rows.
    """

    features: Tensor
    coords_bzyx: Tensor
    batch_size: int


def pad_voxels(voxels: VoxelBatch, rows: int) -> VoxelBatch:
    """The same voxels in so many rows, for `SparseEncoder.encode_fixed`: those behind them are of frame -1.

    Errors: ValueError where there are more voxels than rows.
    """
    missing = rows - voxels.coords_bzyx.shape[0]
    if missing < 0:
        raise ValueError(f"{voxels.coords_bzyx.shape[0]} voxels do not fit into {rows} rows")
    features = F.pad(voxels.features, (0, 0, 0, missing))
    return VoxelBatch(features, F.pad(voxels.coords_bzyx, (0, 0, 0, missing), value=-1), voxels.batch_size)


def voxel_grid_shape(*, voxel_size: Sequence[float], point_range: Sequence[float]) -> tuple[int, int, int]:
    """Number of cells (z, y, x) of a range: round((max - min) / voxel).

    voxel_size (x, y, z) and point_range (x_min, y_min, z_min, x_max, y_max, z_max) in metres.
    """
    cells = [round((point_range[i + 3] - point_range[i]) / voxel_size[i]) for i in range(3)]
    if min(cells) < 1:
        raise ValueError(
            f"point_range {tuple(point_range)} holds {tuple(cells)} voxels (x, y, z) of size {tuple(voxel_size)}; "
            "expected at least one along each axis"
        )
    return cells[2], cells[1], cells[0]


def voxelize(
    points: Tensor,
    *,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    max_points: int = 10,
    max_voxels: int,
) -> tuple[Tensor, Tensor]:
    """Hard voxelisation in first-come order, and the mean of each voxel's points.

    A point belongs to cell floor((p - min) / voxel_size), computed in the dtype of the points; the lower bound of
    the range is inside, the upper bound outside. Voxels are numbered by their first point. Each keeps its first
    `max_points` points. Only the first `max_voxels` voxels exist; later points still fill those. Points with a
    non-finite value enter no voxel. The result is the same on every device and from run to run.

    Args:
        points (P, F) float: x, y, z first, metres, LiDAR frame.
        voxel_size (x, y, z) and point_range (x_min, y_min, z_min, x_max, y_max, z_max): metres.

    Returns:
        features (S, F), dtype of the points: mean over the kept points.
        coords (S, 3) int32: cell (z, y, x), inside `voxel_grid_shape`.

    Source: spconv PointToVoxel (CPU) and mmdet3d HardSimpleVFE.
    """
    depth, height, width = voxel_grid_shape(voxel_size=voxel_size, point_range=point_range)
    # Divisors are tensors: CUDA turns the division by a Python number into a multiplication by its inverse, which
    # moves points across cell borders.
    columns = points.t().contiguous()
    lower = columns.new_tensor(point_range[:3])[:, None]
    size = columns.new_tensor(voxel_size)[:, None]
    upper = columns.new_tensor((width, height, depth))[:, None]
    cells = ((columns[:3] - lower) / size).floor_()
    # Both comparisons are false for NaN, so only the other columns need the test for finiteness.
    inside = ((cells >= 0) & (cells < upper)).all(dim=0) & columns[3:].isfinite().all(dim=0)
    kept = inside.nonzero().squeeze(1)
    if kept.numel() == 0:
        return points.new_zeros(0, points.shape[1]), torch.zeros(0, 3, dtype=torch.int32, device=points.device)

    # Points grouped by cell; the stable sort keeps their order within a cell.
    key_dtype = torch.int32 if depth * height * width <= INT32_MAX else torch.int64
    x, y, z = cells.index_select(1, kept).to(key_dtype)
    keys, order = ((z * height + y) * width + x).sort(stable=True)
    is_start = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=is_start[1:])
    starts = is_start.nonzero().squeeze(1)
    counts = torch.diff(starts, append=starts.new_tensor([keys.numel()])).clamp_(max=max_points)

    # Cells in the order of their first point, at most max_voxels of them.
    by_first = order.index_select(0, starts).int().argsort()[:max_voxels]
    starts, counts = starts.index_select(0, by_first), counts.index_select(0, by_first)
    keys = keys.index_select(0, starts)
    plane = torch.div(keys, width, rounding_mode="floor")
    coords = torch.stack((plane // height, plane % height, keys - plane * width), dim=1).int()
    # One segment per voxel: the position of each kept point among the sorted points.
    shift = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)
    position = shift.add_(torch.arange(shift.numel(), device=shift.device))
    rows = kept.index_select(0, order.index_select(0, position))
    features = torch.segment_reduce(points.index_select(0, rows), "mean", lengths=counts, axis=0, unsafe=True)
    return features, coords


def voxelize_batch(
    clouds: Sequence[Tensor],
    *,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    max_points: int = 10,
    max_voxels: int,
) -> VoxelBatch:
    """`voxelize` for each cloud (P_b, F) of a batch; the batch size is the number of clouds."""
    if not clouds:
        raise ValueError("voxelize_batch needs at least one cloud, got an empty list")
    features, coords = [], []
    for b, points in enumerate(clouds):
        means, cells = voxelize(
            points, voxel_size=voxel_size, point_range=point_range, max_points=max_points, max_voxels=max_voxels
        )
        features.append(means)
        coords.append(F.pad(cells, (1, 0), value=b))
    return VoxelBatch(torch.cat(features), torch.cat(coords), len(clouds))
