"""Shares of equal cost: how the blocks of keys outside windows are dealt out to the parts of a modality.

A GPU is as fast as its last program. A block in which the mask decides costs about twice what another one costs, so the
parts are cut by cost and not by number of blocks.

Shape letters: B batch, I blocks of queries.
"""

from itertools import pairwise

import torch
from torch import Tensor

# First block of a run and the one behind its last, (B, I) int64 each.
Run = tuple[Tensor, Tensor]
# Cost of a block with the mask, in blocks without; fitted to times on an H200 (docs/benchmarks.md).
MASK_COST = 2


def rest_runs(
    touched: Run, num_parts: int, tokens: tuple[int, int], block_k: int, *, has_token_mask: bool = False
) -> list[tuple[Run, Run]]:
    """Cut the blocks of a modality into parts of about equal cost.

    A part is one run of blocks without the mask and one with it. So one of the cuts lies inside the touched run or at
    an end of it. A block that holds tokens of both modalities, or none in its last places, is an edge: it needs the
    mask and belongs to the first or the last part, which has no touched blocks then unless they adjoin the edge.

    Args:
        touched: the blocks in which the mask decides; empty where first and last are the same.
        num_parts: at least 2, and at least 3 with an edge at the start.
        tokens: first token of the modality and the one behind its last.
        block_k: tokens in a block.
        has_token_mask: the mask decides in every block.

    Returns:
        for every part its run without the mask and its run with it.
    """
    start, stop = tokens
    outer = (start // block_k, -(-stop // block_k))
    inner = (-(-start // block_k), stop // block_k)
    if inner[0] > inner[1]:  # the modality lies inside one block
        inner = (outer[1], outer[1])
    low, high = (x.clamp(*inner) for x in touched)
    nothing = (torch.zeros_like(low), torch.zeros_like(low))
    if has_token_mask:
        cuts = [torch.full_like(low, outer[0] + (outer[1] - outer[0]) * i // num_parts) for i in range(num_parts + 1)]
        return [(nothing, run) for run in pairwise(cuts)]
    is_empty = low == high
    low, high = (torch.where(is_empty, inner[0], x) for x in (low, high))
    has_edges = (outer[0] < inner[0], inner[1] < outer[1])
    cuts = equal_cuts(low, high, inner, num_parts, has_edges)
    runs = []
    for i, (first, last) in enumerate(pairwise(cuts)):
        is_before = first < low
        full_first = torch.where(is_before, first, torch.maximum(first, high))
        full_last = torch.where(is_before, torch.minimum(last, low), torch.maximum(last, high))
        mask_first, mask_last = (torch.clamp(x, low, high) for x in (first, last))
        if has_edges[0] and i == 0:
            mask_first, mask_last = outer[0] + nothing[0], torch.where(low == inner[0], mask_last, inner[0])
        if has_edges[1] and i == num_parts - 1:
            mask_first, mask_last = torch.where(high == inner[1], mask_first, inner[1]), outer[1] + nothing[0]
        runs.append(((full_first, full_last), (mask_first, mask_last)))
    return runs


def equal_cuts(
    low: Tensor, high: Tensor, inner: tuple[int, int], num_parts: int, has_edges: tuple[bool, bool]
) -> list[Tensor]:
    """Cuts of the blocks ``inner`` into parts of about equal cost.

    For every number of parts in front of the cut that lies in the touched run, the dearest part is looked at. Whole
    numbers only, so that every device cuts alike.

    Args:
        low, high: (B, I) the touched run; where it is empty, no cut is bound to it.
        inner: first block and the one behind the last.
        num_parts: at least 2.
        has_edges: whether the first and the last part have an edge to look after.

    Returns:
        num_parts + 1 tensors (B, I), ascending.
    """
    start, stop = inner
    before, touched = low - start, MASK_COST * (high - low)
    total = before + touched + stop - high
    is_bound = high > low

    def cost(cut: Tensor) -> Tensor:
        """Of what lies in front of a cut."""
        return torch.minimum(cut, low) - start + MASK_COST * (torch.clamp(cut, low, high) - low) + (cut - high).relu()

    def place(share: Tensor) -> Tensor:
        """Where the cost in front is a share of the total."""
        inside = torch.minimum(low + (share - before) // MASK_COST, high)
        behind = high + (share - before - touched).relu()
        return torch.where(share <= before, start + share, torch.where(share <= before + touched, inside, behind))

    chosen_count, chosen_cut = torch.ones_like(low), low
    lowest = torch.full_like(low, torch.iinfo(low.dtype).max)
    for count in range(1, num_parts):
        cut = place(total * count // num_parts)
        nearest = torch.clamp(cut, low, high)
        if has_edges[0] and count == 1:
            nearest = low
        if has_edges[1] and count == num_parts - 1:
            nearest = high
        cut = torch.where(is_bound, nearest, cut)
        in_front = cost(cut)
        dearest = torch.maximum(-(-in_front // count), -(-(total - in_front) // (num_parts - count)))
        is_better = dearest < lowest
        lowest = torch.where(is_better, dearest, lowest)
        chosen_count = torch.where(is_better, count, chosen_count)
        chosen_cut = torch.where(is_better, cut, chosen_cut)
    in_front = cost(chosen_cut)
    cuts = []
    for i in range(1, num_parts):
        share_behind = in_front + (total - in_front) * (i - chosen_count) // (num_parts - chosen_count)
        cut = torch.where(i < chosen_count, place(in_front * i // chosen_count), place(share_behind))
        cuts.append(torch.where(i == chosen_count, chosen_cut, cut))
    if has_edges[0]:
        cuts[0] = torch.where(is_bound & (low > start), torch.minimum(cuts[0], low), cuts[0])
    if has_edges[1]:
        cuts[-1] = torch.where(is_bound & (high < stop), torch.maximum(cuts[-1], high), cuts[-1])
    return [torch.full_like(low, start), *cuts, torch.full_like(low, stop)]
