"""Partitions of equal cost: with partitions of equal length the forward pass would take 6 to 15 % longer.

Both read the same blocks. But partitions of equal length, cut without regard to the windows, have 6 to 27 % more
partial blocks, which cost twice as much as full ones, and the kernel takes as long as its slowest program.
``tests/unit/attention/flex/test_partition.py`` counts this for the shapes of docs/benchmarks.md; measured at B1 Q900
K22384, 159 us became 139.

Shape letters: B batch, I blocks of queries.
"""

from itertools import pairwise

import torch
from torch import Tensor

# First block of a range and its end (exclusive), (B, I) int64 each.
BlockRange = tuple[Tensor, Tensor]
# Cost of a block with the mask, in blocks without; fitted to times on an H200 (docs/benchmarks.md).
MASK_COST = 2


def rest_partitions(
    partial: BlockRange, num_partitions: int, tokens: tuple[int, int], block_k: int, *, has_token_mask: bool = False
) -> list[tuple[BlockRange, BlockRange]]:
    """Cut the blocks of a grid into partitions of about equal cost.

    A partition is one range of full blocks and one of partial ones, because the kernel takes one range of each. So one
    of the cuts lies inside the range of partial blocks or at an end of it. A block that holds tokens of two grids, or
    that ends in padding, is an edge: it needs the mask and goes to the first or the last partition, which then has no
    other partial blocks unless they adjoin the edge.

    Args:
        partial: the blocks that hold windows; empty where first and end are the same.
        num_partitions: at least 2, and at least 3 with an edge at the start.
        tokens: first token of the grid and the end (exclusive).
        block_k: tokens in a block.
        has_token_mask: every block is partial.

    Returns:
        for every partition its range of full blocks and its range of partial ones.
    """
    start, end = tokens
    outer = (start // block_k, -(-end // block_k))
    inner = (-(-start // block_k), end // block_k)
    if inner[0] > inner[1]:  # the whole grid lies inside one block
        inner = (outer[1], outer[1])
    low, high = (x.clamp(*inner) for x in partial)
    nothing = (torch.zeros_like(low), torch.zeros_like(low))
    if has_token_mask:
        size = outer[1] - outer[0]
        cuts = [torch.full_like(low, outer[0] + size * i // num_partitions) for i in range(num_partitions + 1)]
        return [(nothing, blocks) for blocks in pairwise(cuts)]
    is_empty = low == high
    low, high = (torch.where(is_empty, inner[0], x) for x in (low, high))
    has_edges = (outer[0] < inner[0], inner[1] < outer[1])
    cuts = equal_cuts(low, high, inner, num_partitions, has_edges)
    partitions = []
    for i, (first, last) in enumerate(pairwise(cuts)):
        is_before = first < low
        full_first = torch.where(is_before, first, torch.maximum(first, high))
        full_end = torch.where(is_before, torch.minimum(last, low), torch.maximum(last, high))
        mask_first, mask_end = (torch.clamp(x, low, high) for x in (first, last))
        if has_edges[0] and i == 0:
            mask_first, mask_end = outer[0] + nothing[0], torch.where(low == inner[0], mask_end, inner[0])
        if has_edges[1] and i == num_partitions - 1:
            mask_first, mask_end = torch.where(high == inner[1], mask_first, inner[1]), outer[1] + nothing[0]
        partitions.append(((full_first, full_end), (mask_first, mask_end)))
    return partitions


def equal_cuts(
    low: Tensor, high: Tensor, inner: tuple[int, int], num_partitions: int, has_edges: tuple[bool, bool]
) -> list[Tensor]:
    """Cuts of the blocks ``inner`` into partitions of about equal cost.

    One cut must lie in the range of partial blocks. Every possible number of partitions before that cut is tried, and
    the one whose most expensive partition costs least is taken. Integers only, so that every device cuts alike.

    Args:
        low, high: (B, I) the range of partial blocks; where it is empty, all cuts are free.
        inner: first block and the end (exclusive).
        num_partitions: at least 2.
        has_edges: whether the first and the last partition have an edge.

    Returns:
        num_partitions + 1 tensors (B, I), ascending.
    """
    start, end = inner
    before, masked = low - start, MASK_COST * (high - low)
    total = before + masked + end - high
    is_bound = high > low

    def cost(cut: Tensor) -> Tensor:
        """Cost of the blocks before a cut."""
        return torch.minimum(cut, low) - start + MASK_COST * (torch.clamp(cut, low, high) - low) + (cut - high).relu()

    def position_of(share: Tensor) -> Tensor:
        """The cut before which the blocks cost ``share``."""
        inside = torch.minimum(low + (share - before) // MASK_COST, high)
        behind = high + (share - before - masked).relu()
        return torch.where(share <= before, start + share, torch.where(share <= before + masked, inside, behind))

    chosen_count, chosen_cut = torch.ones_like(low), low
    lowest = torch.full_like(low, torch.iinfo(low.dtype).max)
    for count in range(1, num_partitions):
        cut = position_of(total * count // num_partitions)
        nearest = torch.clamp(cut, low, high)
        if has_edges[0] and count == 1:
            nearest = low
        if has_edges[1] and count == num_partitions - 1:
            nearest = high
        cut = torch.where(is_bound, nearest, cut)
        in_front = cost(cut)
        most_expensive = torch.maximum(-(-in_front // count), -(-(total - in_front) // (num_partitions - count)))
        is_better = most_expensive < lowest
        lowest = torch.where(is_better, most_expensive, lowest)
        chosen_count = torch.where(is_better, count, chosen_count)
        chosen_cut = torch.where(is_better, cut, chosen_cut)
    in_front = cost(chosen_cut)
    cuts = []
    for i in range(1, num_partitions):
        share_behind = in_front + (total - in_front) * (i - chosen_count) // (num_partitions - chosen_count)
        cut = torch.where(i < chosen_count, position_of(in_front * i // chosen_count), position_of(share_behind))
        cuts.append(torch.where(i == chosen_count, chosen_cut, cut))
    if has_edges[0]:
        cuts[0] = torch.where(is_bound & (low > start), torch.minimum(cuts[0], low), cuts[0])
    if has_edges[1]:
        cuts[-1] = torch.where(is_bound & (high < end), torch.maximum(cuts[-1], high), cuts[-1])
    return [torch.full_like(low, start), *cuts, torch.full_like(low, end)]
