"""Hard voxelisation of point clouds.

Shapes: B batch, P points, S voxels, F features of a point (x, y, z first, metres, LiDAR frame).

`voxelize` has as many rows as there are voxels, for which it waits for the GPU. `voxelize_fixed` gives the same voxels
in a fixed number of rows: nothing waits, so a compiled graph can hold it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_aqr.geometry import constant_like

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
    """The same voxels in a given number of rows, for `SparseEncoder.encode_fixed`: the rest have frame -1.

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
    shape = depth, height, width = voxel_grid_shape(voxel_size=voxel_size, point_range=point_range)
    cells, inside = _cells_of_points(points.t().contiguous(), shape, voxel_size, point_range)
    kept = inside.nonzero().squeeze(1)
    if kept.numel() == 0:
        return points.new_zeros(0, points.shape[1]), torch.zeros(0, 3, dtype=torch.int32, device=points.device)

    # Points grouped by cell; the stable sort keeps their order within a cell.
    key_dtype = _key_dtype(depth * height * width)
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
    line = torch.div(keys, width, rounding_mode="floor")
    coords = torch.stack((line // height, line % height, keys - line * width), dim=1).int()
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


def _cells_of_points(
    columns: Tensor, shape: tuple[int, int, int], voxel_size: Sequence[float], point_range: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Columns (F, P) of points -> cells x, y, z (3, P) in the dtype of the points, and whether they count (P,).

    The divisors are tensors: CUDA turns the division by a Python number into a multiplication by its inverse, which
    moves points across cell borders. So does a compiled kernel, whose division is off by up to 2 ulp in float32; that
    of float64 is exact, and rounding its result to float32 gives the float32 quotient.
    """
    lower = constant_like(point_range[:3], columns)[:, None]
    size = constant_like(voxel_size, columns)[:, None]
    upper = constant_like(shape[::-1], columns)[:, None]
    offsets = columns[:3] - lower
    if torch.compiler.is_compiling():
        quotients = (offsets.double() / size.double()).to(columns.dtype)
    else:
        quotients = offsets / size
    cells = quotients.floor()
    # Both comparisons are false for NaN, so only the other columns need the test for finiteness.
    return cells, ((cells >= 0) & (cells < upper)).all(dim=0) & columns[3:].isfinite().all(dim=0)


def _key_dtype(num_cells: int) -> torch.dtype:
    return torch.int32 if num_cells <= INT32_MAX else torch.int64


def pad_points(clouds: Sequence[Tensor], out: Tensor) -> None:
    """Write clouds (P_b, F) into the first rows of out (B, P, F); the other rows become NaN, which no voxel takes.

    There may be fewer clouds than B. With page-locked clouds nothing waits for the GPU.
    """
    for b, rows in enumerate(out):
        count = 0
        if b < len(clouds):
            count = len(clouds[b])
            rows[:count].copy_(clouds[b], non_blocking=True)
        rows[count:].fill_(math.nan)


def voxelize_fixed(
    points: Tensor,
    *,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    max_points: int = 10,
    max_voxels: int,
    rows: int,
) -> tuple[VoxelBatch, Tensor]:
    """`voxelize_batch` with fixed sizes: the same voxels in the same order, in `rows` rows.

    Args:
        points (B, P, F) float: see `voxelize`; rows that are no points hold NaN (`pad_points`).
        max_voxels: of a frame.
        rows: of the result; enough for all frames together, or the last voxels are missing.

    Returns:
        The voxels, frame -1 in unused rows; and their true number (int64, on the device), more than `rows` where
        some are missing.
    """
    batch_size, num_points, num_features = points.shape
    shape = depth, height, width = voxel_grid_shape(voxel_size=voxel_size, point_range=point_range)
    points = points.flatten(0, 1)
    cells, inside = _cells_of_points(points.t().contiguous(), shape, voxel_size, point_range)
    no_voxel = batch_size * depth * height * width
    x, y, z = torch.where(inside, cells, 0).to(_key_dtype(no_voxel))
    position = torch.arange(len(points), device=points.device)
    keys = (((position // num_points).to(x.dtype) * depth + z) * height + y) * width + x
    # Points grouped by cell; the stable sort keeps their order within a cell, and frames in their order.
    keys, order = keys.masked_fill(~inside, no_voxel).sort(stable=True)
    is_start = F.pad(keys[1:] != keys[:-1], (1, 0), value=True) & (keys < no_voxel)

    # Rows in the order of the first points, at most max_voxels of a frame.
    is_first = torch.zeros_like(inside).scatter(0, order, is_start).view(batch_size, num_points)
    is_first = (is_first & (is_first.cumsum(1) <= max_voxels)).flatten()
    ordinals = is_first.cumsum(0)
    row = torch.where(is_first & (ordinals <= rows), ordinals - 1, rows).index_select(0, order)
    row = row.masked_fill(~is_start, rows)  # one extra row takes all others
    start = torch.full((rows + 1,), len(points), device=points.device).scatter(0, row, position)[:rows]

    # The points of a voxel follow each other in the sorted order and share its key.
    keys = F.pad(keys, (0, max_points), value=no_voxel)
    key = keys.index_select(0, start)
    line = (start[:, None] + torch.arange(max_points, device=points.device)).flatten()
    is_member = (keys.index_select(0, line).view(rows, -1) == key[:, None]) & (key[:, None] < no_voxel)
    members = points.index_select(0, F.pad(order, (0, max_points)).index_select(0, line))
    total = torch.where(is_member[..., None], members.view(rows, max_points, num_features), 0).sum(dim=1)
    features = total / is_member.sum(dim=1, keepdim=True).clamp(min=1)
    line = key // width
    depths = line // height
    coords = torch.stack((depths // depth, depths % depth, line % height, key % width), dim=1).int()
    coords = torch.where(key[:, None] < no_voxel, coords, -1)
    return VoxelBatch(features, coords, batch_size), ordinals[-1]
