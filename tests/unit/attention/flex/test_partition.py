"""What partitions of equal cost gain over equal parts, counted on the CPU for the shapes of docs/benchmarks.md."""

import heapq

import pytest
import torch

from cmt_aqr.attention.flex import kernel, partition, schedule
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from cmt_aqr.tools.bench_attention import HEADS
from cmt_aqr.tools.bench_shapes import ATTENTION_SHAPES

# Fitted to measured forward passes on an H200 (docs/benchmarks.md): a program costs as much as this many full blocks,
# and this many programs run at a time. The end of the last one predicts the kernel's time to 3 %.
PROGRAM_COST = 7
NUM_SLOTS = 132 * 3


def equal_parts(partial, num_partitions, tokens, block_k, *, has_token_mask=False):
    """The alternative to `rest_partitions`: cuts at equal numbers of blocks, wherever the windows lie.

    A part still has one range of full and one of partial blocks: where windows lie in its middle, the blocks on the
    shorter side of them are partial too.
    """
    start, end = tokens
    first_block, last_block = start // block_k, -(-end // block_k)
    low, high = partial
    nothing = torch.zeros_like(low)
    parts = []
    for i in range(num_partitions):
        first, last = (nothing + first_block + (last_block - first_block) * j // num_partitions for j in (i, i + 1))
        begin, stop = torch.clamp(low, first, last), torch.clamp(high, first, last)
        is_empty = begin >= stop
        if i == 0 and start % block_k:
            begin, stop = first, torch.where(is_empty, first + 1, stop)
            is_empty = is_empty & False
        if i == num_partitions - 1 and end % block_k:
            begin, stop = torch.where(is_empty, last - 1, begin), last
            is_empty = is_empty & False
        ends_partial = last - begin <= stop - first
        full = torch.where(ends_partial, first, stop), torch.where(ends_partial, begin, last)
        masked = torch.where(ends_partial, begin, first), torch.where(ends_partial, last, stop)
        full = torch.where(is_empty, first, full[0]), torch.where(is_empty, last, full[1])
        parts.append((full, tuple(torch.where(is_empty, 0, x) for x in masked)))
    return parts


def kernel_work(shape):
    """Blocks visited, partial ones of them, and the end of the last program in full blocks."""
    layout = fusion_layout(shape.bev, shape.cameras, cell_size=shape.cell_size)
    windows = make_windows(layout, shape.batch_size, shape.num_queries, num_clusters=shape.clusters, device="cpu")
    splits = (kernel.SPLITS_FIRST, kernel.SPLITS_FURTHER)
    made = schedule.make_schedule(windows, block_q=kernel.BLOCK_Q, block_k=kernel.BLOCK_K, splits=splits)
    num_programs = made.num_partitions * -(-shape.num_queries // kernel.BLOCK_Q)  # behind them the lists are filled up
    full, partial = (lists.num[..., :num_programs] for lists in (made.full, made.partial))
    costs = PROGRAM_COST + full + partition.MASK_COST * partial
    ends = [0] * NUM_SLOTS
    for cost in costs[:, None].expand(-1, HEADS, -1, -1).flatten().tolist():
        heapq.heapreplace(ends, ends[0] + cost)
    return int((full + partial).sum()), int(partial.sum()), max(ends)


# Later end of the last program with equal parts, percent; the first line of partition.py states the range.
SHAPES = ATTENTION_SHAPES[:4]
GAINS = (15, 6, 9, 7)


@pytest.mark.parametrize(("shape", "gain"), list(zip(SHAPES, GAINS, strict=True)), ids=map(str, SHAPES))
def test_equal_parts_would_end_later(monkeypatch, shape, gain):
    visited, partial, end = kernel_work(shape)
    monkeypatch.setattr(schedule, "rest_partitions", equal_parts)
    equal_visited, equal_partial, equal_end = kernel_work(shape)
    assert equal_visited == visited  # the same blocks: what differs is which are partial, and who does them
    assert 1.05 < equal_partial / partial < 1.3
    assert equal_end / end == pytest.approx(1 + gain / 100, abs=0.01)


def test_the_first_line_states_the_gain():
    first_line = partition.__doc__.splitlines()[0]
    assert f"{min(GAINS)} to {max(GAINS)} %" in first_line
