"""Sparse 3D convolutions in plain PyTorch: tables of rows, one gather and one matrix product a layer.

Shapes: B batch, R rows (active cells), K kernel positions (27 or 3), C channels, (D, H, W) = cells in (z, y, x).

Every level has a dense table of its grid that gives each active cell its row. The grid has a border of one inactive
cell on all sides, so a neighbour is a constant distance away in the table and needs no test for the grid's edge. A
convolution is ``features[neighbours].flatten(1) @ weight``; its backward pass is the same with the table of the other
direction, and one matrix product for the weight: no atomic additions, so it is reproducible bit for bit.

Sizes are exact, which waits for the GPU once a level, or fixed capacities, which never wait: rows after the active
ones have no neighbours and are no cell's neighbour. Where a capacity is too small, the counts exceed it and the map of
:func:`dense_map` is NaN.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cmt_aqr.models.gather import gather_product, gathered_chunks, stored

HEAD_ROOM = 1.25

logger = logging.getLogger(__name__)


def convolved_shape(
    shape: Sequence[int], *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Cells (z, y, x) after a strided convolution: floor((n + 2 * padding - kernel) / stride) + 1 along each axis."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True))


class SparseConvolution(nn.Module):
    """Parameters and geometry of a sparse convolution without bias; weight (out, kz, ky, kx, in).

    A submanifold convolution (``subm``) has the output cells of its input. Any other activates every cell whose window
    holds an active one. Fresh weights are uniform within 1 / sqrt(fan in), like spconv's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Sequence[int] = (3, 3, 3),
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (1, 1, 1),
        subm: bool = False,
    ):
        super().__init__()
        if not set(padding) <= {0, 1}:
            raise ValueError(f"padding (z, y, x) is {tuple(padding)}; expected 0 or 1 along each axis")
        self.kernel, self.stride, self.padding, self.subm = tuple(kernel), tuple(stride), tuple(padding), subm
        self.weight = nn.Parameter(torch.empty(out_channels, *kernel, in_channels))
        bound = 1 / math.sqrt(in_channels * math.prod(kernel))
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Channels and geometry, for print."""
        kind = "submanifold" if self.subm else f"stride {self.stride}, padding {self.padding}"
        return f"{self.weight.shape[-1]} -> {self.weight.shape[0]}, kernel {self.kernel}, {kind}"


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells (z, y, x) of B frames, numbered with a border of one cell on all sides.

    After the numbered cells come numbers without cells, with `unused` in their middle: it is the number of rows that
    are not in use, and none of its neighbours is active.
    """

    shape: tuple[int, int, int]
    batch_size: int

    @property
    def pitches(self) -> tuple[int, int, int]:
        """Distance in the numbering of neighbours along z, y, x."""
        _, height, width = self.shape
        return (height + 2) * (width + 2), width + 2, 1

    @property
    def num_numbers(self) -> int:
        """Numbers of the cells with their border."""
        return self.batch_size * (self.shape[0] + 2) * self.pitches[0]

    @property
    def unused(self) -> int:
        """Number of rows that are not in use."""
        return self.num_numbers + sum(self.pitches)

    @property
    def length(self) -> int:
        """Length of a table: every number and every neighbour of it is inside."""
        return self.unused + sum(self.pitches) + 1

    def number(self, b: Tensor, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Numbers (int64) of cells; coordinates may be one outside the shape, on the border."""
        depth, height, width = self.shape
        return ((b.long() * (depth + 2) + z + 1) * (height + 2) + y + 1) * (width + 2) + x + 1

    def cells(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frame and cell (b, z, y, x) of numbers, each int64."""
        depth, height, width = self.shape
        rest, x = numbers // (width + 2), numbers % (width + 2)
        rest, y = rest // (height + 2), rest % (height + 2)
        return rest // (depth + 2), rest % (depth + 2) - 1, y - 1, x - 1


@dataclass(frozen=True, eq=False)
class Sites:
    """The active cells of a level.

    Attributes:
        grid: the numbering.
        numbers: (R,) int64, the cell of each row; `grid.unused` for rows not in use.
        table: (grid.length,) int32, the row of each cell; R where there is none.
        is_used: (R,) whether a row is in use; None: all are.
        count: () int64 on the device, active cells, of which those beyond R have no row; None where sizes are exact.
    """

    grid: Grid
    numbers: Tensor
    table: Tensor
    is_used: Tensor | None = None
    count: Tensor | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.numbers.shape[0]


def find_neighbours(sites: Sites) -> Tensor:
    """(R, 27) int32: rows of the cells of the 3 x 3 x 3 window, z slowest; R where there is none."""
    offsets = kernel_offsets((3, 3, 3), sites.grid, sites.numbers.device)
    return look_up(sites.table, sites.numbers - sum(sites.grid.pitches), offsets)


def kernel_offsets(kernel: Sequence[int], grid: Grid, device: torch.device) -> Tensor:
    """(K,) int64: distance of each position of a kernel from the first one; made on the device, without a copy."""
    axes = [torch.arange(k, device=device) * pitch for k, pitch in zip(kernel, grid.pitches, strict=True)]
    return (axes[0][:, None, None] + axes[1][:, None] + axes[2]).flatten()


def look_up(table: Tensor, first: Tensor, offsets: Tensor) -> Tensor:
    """Entries (R, K) of a table at first (R,) + offsets (K,)."""
    return stored(table.index_select(0, (first[:, None] + offsets).flatten()).view(-1, offsets.shape[0]))


def find_sites(coords_bzyx: Tensor, shape: Sequence[int], batch_size: int, *, is_fixed: bool) -> Sites:
    """Sites of distinct voxels (R, 4).

    Exact: all voxels must be inside the shape. Fixed: those outside, or of a negative frame, are rows not in use.
    """
    grid = Grid(tuple(shape), batch_size)
    numbers = grid.number(*coords_bzyx.unbind(1))
    is_used = None
    if is_fixed:
        axes = zip(coords_bzyx.unbind(1), (batch_size, *shape), strict=True)
        is_used = torch.stack([(c >= 0) & (c < n) for c, n in axes]).all(dim=0)
        numbers = numbers.masked_fill(~is_used, grid.unused)
    rows = numbers.shape[0]
    table = torch.full((grid.length,), rows, dtype=torch.int32, device=numbers.device)
    table.scatter_(0, numbers, torch.arange(rows, dtype=torch.int32, device=numbers.device))
    table[grid.unused :].fill_(rows)
    return Sites(grid, numbers, table, is_used)


def find_output_sites(sites: Sites, convolution: SparseConvolution, capacity: int | None) -> Sites:
    """Sites of a strided convolution's output, in the order of their cells; `capacity` rows where it is given."""
    geometry = {"kernel": convolution.kernel, "stride": convolution.stride, "padding": convolution.padding}
    grid = Grid(convolved_shape(sites.grid.shape, **geometry), sites.grid.batch_size)
    is_active = torch.zeros(grid.length, dtype=torch.bool, device=sites.numbers.device)
    is_active.index_fill_(0, reached_numbers(sites, convolution, grid).flatten(), True)
    is_active[grid.unused :].fill_(False)
    ordinals = is_active.cumsum(0, dtype=torch.int32)
    count = ordinals[-1]
    rows = int(count) if capacity is None else capacity
    wanted = torch.arange(1, rows + 1, dtype=torch.int32, device=ordinals.device)
    numbers = torch.searchsorted(ordinals, wanted)  # the first cell up to which that many are active
    if capacity is None:
        return Sites(grid, numbers, (ordinals - 1).masked_fill_(~is_active, rows))
    is_used = wanted <= count
    numbers = numbers.masked_fill(~is_used, grid.unused)
    table = (ordinals - 1).masked_fill_(~is_active | (ordinals > rows), rows)
    return Sites(grid, numbers, table, is_used, count.long())


def reached_numbers(sites: Sites, convolution: SparseConvolution, grid: Grid) -> Tensor:
    """Output cells (R, up to 8) in whose windows the rows lie; `grid.unused` where there are fewer."""
    b, *cell = sites.grid.cells(sites.numbers)
    axes = []
    for axis, position in enumerate(cell):
        kernel, stride = convolution.kernel[axis], convolution.stride[axis]
        shifted = position + convolution.padding[axis]
        steps = torch.arange(-(-kernel // stride), device=shifted.device)
        out = torch.div(shifted, stride, rounding_mode="floor")[:, None] - steps
        is_inside = (out >= 0) & (out < grid.shape[axis]) & (shifted[:, None] - out * stride < kernel)
        axes.append((out, is_inside))
    return _combine(grid, b, axes, sites).flatten(1)


def output_rows(sites: Sites, convolution: SparseConvolution, outputs: Sites) -> Tensor:
    """(R, K) int32: for every kernel position the output row that reads this input row there; outputs.rows: none."""
    b, *cell = sites.grid.cells(sites.numbers)
    axes = []
    for axis, position in enumerate(cell):
        stride = convolution.stride[axis]
        taps = torch.arange(convolution.kernel[axis], device=position.device)
        start = (position + convolution.padding[axis])[:, None] - taps
        axes.append((torch.div(start, stride, rounding_mode="floor"), start % stride == 0))
    numbers = _combine(outputs.grid, b, axes, sites)
    return outputs.table.index_select(0, numbers.flatten()).view(sites.rows, -1)


def _combine(grid: Grid, b: Tensor, axes: list[tuple[Tensor, Tensor]], sites: Sites) -> Tensor:
    """Numbers (R, nz, ny, nx) of all combinations of cells along the axes, each (R, n) with a mask; else unused."""
    (z, has_z), (y, has_y), (x, has_x) = axes
    z, y, x = z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]
    is_valid = has_z[:, :, None, None] & has_y[:, None, :, None] & has_x[:, None, None, :]
    if sites.is_used is not None:
        is_valid = is_valid & sites.is_used[:, None, None, None]
    return grid.number(b[:, None, None, None], z, y, x).masked_fill(~is_valid, grid.unused)


def input_rows(sites: Sites, convolution: SparseConvolution, outputs: Sites) -> Tensor:
    """(R of the outputs, K) int32: for every kernel position the input row there; sites.rows where there is none."""
    b, z, y, x = outputs.grid.cells(outputs.numbers)
    (sz, sy, sx), (pz, py, px) = convolution.stride, convolution.padding
    first = sites.grid.number(b, z * sz - pz, y * sy - py, x * sx - px)
    if outputs.is_used is not None:
        first = first.masked_fill(~outputs.is_used, sites.grid.unused - sum(sites.grid.pitches))
    return look_up(sites.table, first, kernel_offsets(convolution.kernel, sites.grid, first.device))


class _Convolve(torch.autograd.Function):
    """gather_product with the weight (out, kz, ky, kx, in); gradients by gathers in the other direction."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, inputs, outputs)
        return gather_product(x, inputs, weight.flatten(1).t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inputs, outputs = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                matrix = weight.flatten(1, 3).transpose(0, 1).flatten(0, 1)
                grad_x = gather_product(grad, outputs, matrix)
            if ctx.needs_input_grad[1]:
                total = torch.zeros(weight.shape[0], weight[0].numel(), device=x.device, dtype=_sum_dtype(x.dtype))
                for gathered, part in gathered_chunks(x, inputs):
                    total += grad[part].t() @ gathered
                grad_weight = total.to(weight.dtype).view_as(weight)
        return grad_x, grad_weight, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Features (R, C) at sites.

    Where sizes are fixed, `capacities` are those of all strided convolutions, and `counts` the active cells of the
    levels that these have made so far. `neighbours` are those of :func:`find_neighbours`, once a submanifold
    convolution has looked them up, and `mirrored` the same with the window's positions in reverse, the rows in whose
    windows a row lies, once a gradient needs them.
    """

    features: Tensor
    sites: Sites
    capacities: tuple[int, ...] | None = None
    counts: tuple[Tensor, ...] = ()
    neighbours: Tensor | None = None
    mirrored: Tensor | None = None

    def replace_feature(self, features: Tensor) -> "SparseRows":
        """The same sites with other features."""
        return replace(self, features=features)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.sites.grid.batch_size


def convolve(convolution: SparseConvolution, x: SparseRows) -> SparseRows:
    """A sparse convolution of rows."""
    needs_grad = torch.is_grad_enabled() and x.features.requires_grad
    if convolution.subm:
        inputs, outputs = x.neighbours, x.mirrored
        if inputs is None:
            inputs = find_neighbours(x.sites)
        if outputs is None and needs_grad:
            outputs = inputs.flip(1)
        out = replace(x, neighbours=inputs, mirrored=outputs)
    else:
        capacity = None if x.capacities is None else x.capacities[len(x.counts)]
        sites = find_output_sites(x.sites, convolution, capacity)
        inputs = input_rows(x.sites, convolution, sites)
        outputs = output_rows(x.sites, convolution, sites) if needs_grad else None
        out = replace(x, sites=sites, neighbours=None, mirrored=None)
        if x.capacities is not None:
            out = replace(out, counts=(*x.counts, sites.count))
    weight = convolution.weight.to(x.features.dtype)
    return out.replace_feature(_Convolve.apply(x.features, weight, inputs, outputs))


def dense_map(x: SparseRows) -> Tensor:
    """Rows -> grid (B, C * D, H, W), 0 elsewhere; all of the grid is NaN where a capacity was exceeded."""
    features, sites = x.features, x.sites
    (depth, height, width), batch_size = sites.grid.shape, sites.grid.batch_size
    b, z, y, x_cell = sites.grid.cells(sites.numbers)
    cells = batch_size * depth * height * width
    index = ((b * depth + z) * height + y) * width + x_cell
    if sites.is_used is not None:
        index = index.masked_fill(~sites.is_used, cells)  # one more cell, for rows not in use
    grid = features.new_zeros(cells + 1, features.shape[1]).index_copy(0, index, features)[:cells]
    grid = grid.view(batch_size, depth, height, width, -1).movedim(-1, 1).flatten(1, 2)
    if x.capacities is None:
        return grid
    is_exceeded = torch.stack([count > rows for count, rows in zip(x.counts, x.capacities, strict=True)]).any()
    return grid.masked_fill(is_exceeded, math.nan)


class Capacities:
    """Fixed sizes of a SparseEncoder's levels, which grow when they prove too small.

        out, counts = encoder.encode_fixed(voxels, capacities.rows)
        if not capacities.hold(counts): encode again (and capture the CUDA graph again)

    Attributes:
        rows: of every strided convolution's output, a quarter more than was asked for.
    """

    def __init__(self, counts: Sequence[int]):
        self.rows = tuple(_with_head_room(count) for count in counts)

    def hold(self, counts: Tensor) -> bool:
        """Whether the counts of `encode_fixed` fit, which waits for the GPU; where not, `rows` have grown."""
        needed = counts.tolist()
        if all(count <= rows for count, rows in zip(needed, self.rows, strict=True)):
            return True
        old = self.rows
        self.rows = tuple(
            max(rows, _with_head_room(n)) if n > rows else rows for n, rows in zip(needed, old, strict=True)
        )
        logger.warning(
            "sparse encoder: a frame has %s active cells in its levels, more than the %s kept for them; now %s",
            needed, list(old), list(self.rows),
        )  # fmt: skip
        return False


def _with_head_room(count: int) -> int:
    return 256 * math.ceil(max(1, count) * HEAD_ROOM / 256)
