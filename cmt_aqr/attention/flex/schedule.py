"""The schedule of the kernel: partitions of the keys, the order of the queries, block ranges. Speed only.

The bias of a query is one number over its whole window. So attention with the bias is attention without it over
disjoint partitions of the keys (a query's windows; the rest), each with its own lse, merged with the lse of a window
raised by the bias (``merge.py``). No score needs to be changed: which keys are in a partition is a mask_mod, and it has
to be evaluated in partial blocks only, those that hold a window of one of the block's queries: a tenth of all.

One kernel computes all partitions. It makes one pass over every grid, for which the queries are sorted by their windows
there: tokens are stored row by row, so the windows of neighbouring queries lie in one range of blocks, and what a
partition reads is one range of partial and one of full blocks; the kernel then needs no list of block numbers. The
passes are the heads that share one key head in FlexAttention's grouped-query mode, so that the kernel itself sums the
gradients of keys and values. In a pass the queries are repeated once per partition: the first copy sees its
windows, the other copies share the rest of the grid's keys, cut into several partitions to fill the GPU.

Shape letters: B batch, Q queries, N windows of a query in one grid, S grid passes, P partitions of a pass, R rows of
the sorted queries (Q padded to whole blocks), I blocks of queries, J blocks of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..windows import QueryWindows
from .packing import Packing, make_packing, membership_codes, window_codes
from .partition import BlockRange, rest_partitions

# The last dimension of a block list is padded to a multiple of it. FlexAttention's kernels assume that the lists of
# consecutive samples are contiguous, but the compiler may pad what it computes itself, by up to 128 bytes.
LIST_ALIGNMENT = 32


@dataclass(frozen=True)
class GridPass:
    """The partitions of one grid's keys.

    Attributes:
        has_windows: the first partition holds the queries' windows, the others share the rest; False: all keys.
        num_rest: partitions that share the rest, or all.
    """

    has_windows: bool
    num_rest: int

    @property
    def num_partitions(self) -> int:
        """How many partitions have keys; the pass may hold more, without any."""
        return self.has_windows + self.num_rest


@dataclass(frozen=True)
class BlockLists:
    """One range of blocks of keys for every block of queries, in FlexAttention's form.

    The last dimension of each is padded to a multiple of ``LIST_ALIGNMENT``.

    Attributes:
        num: (B, S, P I) int32, how many blocks.
        indices: (B, S, P I, J) int32, which: the first ``num`` entries.
        num_q, indices_q: (B, S, J) and (B, S, J, P I), the same the other way round.
    """

    num: Tensor
    indices: Tensor
    num_q: Tensor
    indices_q: Tensor


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the windows alone.

    Attributes:
        passes: S grid passes, in the order of the grids.
        num_partitions: P, in every pass.
        packing: of the codes.
        order: (B, S, R) int64, the query of every row; the padding rows after the first Q repeat the last query.
        rank: (B, S, Q) int64, the row of every query.
        token_codes: (S, J * block) codes of the tokens as ``membership_codes`` has them.
        window_codes: (B, S, R, N).
        full, partial: blocks whose keys are all in the partition, and blocks in which the mask decides.
        has_token_mask: whether the schedule was made for a token mask: then no block is full.
    """

    passes: tuple[GridPass, ...]
    num_partitions: int
    packing: Packing
    order: Tensor
    rank: Tensor
    token_codes: Tensor
    window_codes: Tensor
    full: BlockLists
    partial: BlockLists
    has_token_mask: bool


def make_schedule(
    windows: QueryWindows, *, block_q: int, block_k: int, splits: tuple[int, ...], has_token_mask: bool = False
) -> Schedule:
    """Sort the queries and find the block ranges.

    Args:
        windows: of the batch.
        block_q, block_k: queries and keys in a block.
        splits: for every grid, into how many partitions the rest of its tokens is cut, at least 2.
        has_token_mask: the mask has to be evaluated in every block.

    Raises:
        ValueError: fewer than 2 splits.
    """
    if min(splits) < 2:
        raise ValueError(f"the rest of the tokens must be cut into at least 2 partitions, got splits {splits}")
    layout, is_local = windows.layout, windows.settings.is_local
    passes = make_passes(windows, splits, block_k)
    num_partitions = max(grid_pass.num_partitions for grid_pass in passes)
    # The kernels skip their bounds checks where the length is a multiple of 128, two blocks of 64 queries.
    num_partitions += num_partitions % 2
    packing = make_packing(layout, windows.settings)
    num_rows = -(-windows.batch_and_queries[1] // block_q) * block_q
    num_blocks = -(-layout.num_tokens // block_k)
    orders, ranks, codes, tables, full, partial = [], [], [], [], [], []
    for number, grid_pass in enumerate(passes):
        rank = query_rank(windows, number)
        order = query_order(rank, num_rows)
        first, end = partial_range(windows, number, order, block_q, block_k)
        has_windows = (first, end if is_local else first)
        nothing = (torch.zeros_like(first), torch.zeros_like(first))
        ranges = [(nothing, has_windows)] if grid_pass.has_windows else []
        ranges += rest_partitions(
            has_windows, grid_pass.num_rest, layout.token_range(number), block_k, has_token_mask=has_token_mask
        )
        ranges += [(nothing, nothing)] * (num_partitions - grid_pass.num_partitions)
        full += [blocks[0] for blocks in ranges]
        partial += [blocks[1] for blocks in ranges]
        orders.append(order)
        ranks.append(rank)
        codes.append(_sorted_codes(windows, packing, number, order))
        device = windows.cells[0].device
        tables.append(membership_codes(layout, packing, number, num_blocks * block_k, device=device))
    return Schedule(
        passes=passes,
        num_partitions=num_partitions,
        packing=packing,
        order=torch.stack(orders, dim=1),
        rank=torch.stack(ranks, dim=1),
        token_codes=torch.stack(tables),
        window_codes=torch.stack(codes, dim=1),
        full=block_lists(full, len(passes), num_blocks),
        partial=block_lists(partial, len(passes), num_blocks),
        has_token_mask=has_token_mask,
    )


def make_passes(windows: QueryWindows, splits: tuple[int, ...], block_k: int) -> tuple[GridPass, ...]:
    """A pass over every grid."""
    passes = []
    for number, num_rest in enumerate(splits):
        # An edge at the start needs one partition more; see rest_partitions.
        has_edge = windows.layout.token_range(number)[0] % block_k > 0
        passes.append(GridPass(windows.settings.is_local, num_rest + has_edge))
    return tuple(passes)


def query_rank(windows: QueryWindows, number: int) -> Tensor:
    """Rank (B, Q) of every query when sorted by the token index of its first window in a grid.

    Queries without a window come last; ties keep their order. Counting the smaller keys is one small kernel where a
    sort takes several.
    """
    layout = windows.layout
    view, row, col = windows.cells[number].unbind(-1)
    key = torch.where(view >= 0, layout.index(number, view, row, col), layout.num_tokens).amin(dim=-1)
    query = torch.arange(key.shape[1], device=key.device)
    key = key * key.shape[1] + query
    return (key[:, None, :] < key[:, :, None]).sum(dim=-1)


def query_order(rank: Tensor, num_rows: int) -> Tensor:
    """The query (B, R) in every row; the padding rows after the first Q repeat the last query."""
    batch_size, num_queries = rank.shape
    query = torch.arange(num_queries, device=rank.device).expand(batch_size, -1)
    order = torch.zeros_like(rank).scatter(1, rank, query)
    return torch.cat((order, order[:, -1:].expand(-1, num_rows - num_queries)), dim=1)


def _sorted_codes(windows: QueryWindows, packing: Packing, number: int, order: Tensor) -> Tensor:
    """Window codes (B, R, N) of the sorted queries; N is the largest of all grids."""
    codes = window_codes(windows, packing, number)
    if not windows.settings.is_local:
        codes = torch.full_like(codes, packing.no_window)
    num_windows = windows.most_per_grid
    codes = nn.functional.pad(codes, (0, num_windows - codes.shape[2]), value=packing.no_window)
    return codes.gather(1, order[..., None].expand(-1, -1, num_windows))


def partial_range(windows: QueryWindows, number: int, order: Tensor, block_q: int, block_k: int) -> BlockRange:
    """The range of blocks of keys that holds all windows of a block of queries.

    Returns:
        first (B, I) block and end (B, I, exclusive), int64; the range is empty, and lies anywhere inside the grid,
        where no query of the block has a window.
    """
    layout, grid = windows.layout, windows.layout.grids[number]
    radius = windows.settings.radius(grid)
    view, row, col = windows.cells[number].unbind(-1)
    has_window = view >= 0
    first = layout.index(number, view, (row - radius).clamp(min=0), (col - radius).clamp(min=0))
    last = layout.index(number, view, (row + radius).clamp(max=grid.rows - 1), (col + radius).clamp(max=grid.cols - 1))
    start, end = layout.token_range(number)
    first = torch.where(has_window, first // block_k, end // block_k).amin(dim=-1)
    last = torch.where(has_window, last // block_k + 1, start // block_k).amax(dim=-1)
    first = first.gather(1, order).unflatten(1, (-1, block_q)).amin(dim=-1)
    last = last.gather(1, order).unflatten(1, (-1, block_q)).amax(dim=-1)
    return torch.minimum(first, last), last


def block_lists(ranges: list[BlockRange], num_passes: int, num_blocks: int) -> BlockLists:
    """FlexAttention's form of one range per partition.

    Args:
        ranges: of all partitions, those of a pass together.
        num_passes: S.
        num_blocks: J.
    """
    first, end = (
        torch.stack(ends, dim=1).unflatten(1, (num_passes, -1)).flatten(2) for ends in zip(*ranges, strict=True)
    )
    num = end - first
    block = torch.arange(num_blocks + -num_blocks % LIST_ALIGNMENT, device=first.device)
    offset = block[:num_blocks] - first[..., None]
    is_member = ((offset >= 0) & (offset < num[..., None])).transpose(-2, -1)
    # The blocks of queries of each block of keys, in order, at the start of a row: a scatter to the counted position;
    # one extra position after the end takes all others.
    count = is_member.cumsum(dim=-1)
    length = is_member.shape[-1]
    position = torch.where(is_member, count - 1, length)
    number = torch.arange(length, dtype=torch.int32, device=first.device)
    indices_q = torch.zeros(*position.shape[:-1], length + 1, dtype=torch.int32, device=first.device)
    indices_q = indices_q.scatter(-1, position, number.expand(position.shape))[..., :length]
    return BlockLists(
        num=_padded(num.to(torch.int32)),
        indices=(first[..., None] + block).clamp(max=num_blocks - 1).to(torch.int32),
        num_q=_padded(count[..., -1].to(torch.int32)),
        indices_q=_padded(indices_q),
    )


def _padded(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, -x.shape[-1] % LIST_ALIGNMENT)).contiguous()
