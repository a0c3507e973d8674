"""One FlexAttention kernel over partitions of the keys; ``schedule.py`` explains them and why this is fast.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head, S grid passes, P partitions of a pass, R
sorted rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..bias import AttentionBias
from ..score_mod import check_flex_input, compile_for_shapes
from ..windows import QueryWindows
from .merge import merge_partitions, sort_into_rows
from .schedule import Schedule, make_schedule

# Sizes of blocks and tiles change the speed, and the numbers by rounding only. Measured on an H200 with D = 32:
# docs/benchmarks.md.
BLOCK_Q = 64
BLOCK_K = 128
# Partitions of the tokens outside windows, of the first grid and of every further one. With the windows' own, and one
# for an edge that a grid may begin with, each pass has up to 6.
SPLITS_FIRST, SPLITS_FURTHER = 5, 4
# Up to this many blocks of queries, of all heads and samples, wide tiles of keys are faster.
FEW_BLOCKS = 256


def make_flex_attention(
    bias: AttentionBias, token_mask: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """q, k, v -> softmax(q k^T / sqrt(D) + bias) v and its lse, for all layers that share the bias.

    Args:
        bias: its windows are sorted, and the block ranges found, once, here.
        token_mask: (B, num_tokens) bool, True = may be attended to; None: all.
    """
    schedule = plan(bias.windows, has_token_mask=token_mask is not None)

    def evaluate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flex_attention_with_bias(q, k, v, bias, schedule, token_mask=token_mask)

    return evaluate


def plan(windows: QueryWindows, *, has_token_mask: bool = False) -> Schedule:
    """What all layers that share the windows share."""
    make = make_schedule if torch.compiler.is_compiling() else _compiled_schedule
    splits = (SPLITS_FIRST, *(SPLITS_FURTHER for _ in windows.cells[1:]))
    with torch.no_grad():
        return make(windows, block_q=BLOCK_Q, block_k=BLOCK_K, splits=splits, has_token_mask=has_token_mask)


def flex_attention_with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, schedule: Schedule, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v and its lse; arguments of ``attend``, and :func:`plan` for the bias's windows.

    Raises:
        ValueError: tensors that the kernel does not take, or a schedule that was made for something else.
    """
    if q.device.type != "cuda":
        raise ValueError(f"the flex backend needs a CUDA GPU, got tensors on {q.device}; use dense")
    check_flex_input(q, "flex")
    check_schedule(schedule, q, token_mask)
    # Without the compiler FlexAttention would ignore the block ranges, which the partitions rely on.
    evaluate = attend_to_partitions if torch.compiler.is_compiling() else _compiled_attention
    return evaluate(q, k, v, bias, schedule, token_mask)


def check_schedule(schedule: Schedule, q: Tensor, token_mask: Tensor | None) -> None:
    """Raise ValueError where results would be silently wrong."""
    planned = (schedule.rank.shape[0], schedule.rank.shape[2])
    if planned != (q.shape[0], q.shape[2]):
        raise ValueError(f"the schedule is for batch and queries {planned}, q has {(q.shape[0], q.shape[2])}")
    if schedule.has_token_mask != (token_mask is not None):
        made, got = ("with" if x else "without" for x in (schedule.has_token_mask, token_mask is not None))
        raise ValueError(f"the schedule was made {made} a token mask and is used {got} one")


def attend_to_partitions(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, schedule: Schedule, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The evaluator without checks, for the compiler."""
    if token_mask is not None:
        token_mask = nn.functional.pad(token_mask, (0, k.shape[2] - token_mask.shape[1]))
    block_mask = make_block_mask(schedule, k.shape[2], token_mask)
    rows = sort_into_rows(q, schedule.order, schedule.rank, schedule.num_partitions)
    out, aux = flex_attention(
        rows.flatten(3, 4).flatten(1, 2),
        k,
        v,
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=kernel_options(q),
    )
    out_p, lse_p = (x.unflatten(2, rows.shape[3:5]).unflatten(1, rows.shape[1:3]) for x in (out, aux.lse))
    added = partition_bias(bias, schedule).to(lse_p.dtype)
    used = tuple((s, p) for s, grid_pass in enumerate(schedule.passes) for p in range(grid_pass.num_partitions))
    return merge_partitions(out_p, lse_p, added, schedule.order, schedule.rank, used)


# Once for the module, so that all callers share what has been compiled.
_compiled_schedule = compile_for_shapes(make_schedule)
_compiled_attention = compile_for_shapes(attend_to_partitions)


def kernel_options(q: Tensor) -> dict[str, Any]:
    """Tiles for these shapes and this dtype.

    The block ranges are contiguous for a block of queries (the forward pass), not for a block of keys (the backward
    pass). ``PRESCALE_QK`` would be a few percent faster, but rounds q twice more: four times the error in bfloat16.
    """
    options: dict[str, Any] = {"fwd_BLOCKS_ARE_CONTIGUOUS": True, "num_warps": 4}
    if q.dtype == torch.float32:
        forward, backward, num_stages = (64, 64), (32, 64, 32, 32), 1
    else:
        num_blocks = q.shape[0] * q.shape[1] * -(-q.shape[2] // BLOCK_Q)
        forward, backward = (64, 128 if num_blocks <= FEW_BLOCKS else 64), (32, 64, 64, 64)
        num_stages = 3 if q.shape[3] <= 64 else 2
    options |= dict(zip(("fwd_BLOCK_M", "fwd_BLOCK_N"), forward, strict=True))
    options |= dict(zip(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), backward, strict=True))
    return options | {"num_stages": num_stages}


def make_block_mask(schedule: Schedule, num_tokens: int, token_mask: Tensor | None = None) -> BlockMask:
    """The mask of the partitions: "head" h of the kernel is pass h % S of key head h // S, "query" i row i % R.

    Args:
        schedule: of the windows.
        num_tokens: length of the token axis, padded or not.
        token_mask: (B, K) bool, True = may be attended to.
    """
    packing, token_codes, centres = schedule.packing, schedule.token_codes, schedule.window_codes
    num_passes, num_rows, num_windows = centres.shape[1:]
    has_windows = schedule.passes[0].has_windows
    # `outside` below is 0 inside a window, less than 2 high elsewhere in the grid, and at least 2 high in other grids.
    # One XOR brings the wanted values, and no others, below a limit: one comparison for both kinds of partition.
    lowest = torch.iinfo(packing.dtype).min
    for_window, for_rest = lowest, -2 * packing.high - 1

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, token: Tensor) -> Tensor:
        grid_pass, row = h % num_passes, i % num_rows
        code = token_codes[grid_pass, token]
        outside = ((code - centres[b, grid_pass, row, 0]) & packing.outside) ^ packing.high
        for n in range(1, num_windows):
            # Inside the union: inside any window.
            other = ((code - centres[b, grid_pass, row, n]) & packing.outside) ^ packing.high
            outside = torch.minimum(outside, other)
        is_window = i < num_rows if has_windows else i < 0
        flip = torch.where(is_window, for_window, for_rest).to(outside.dtype)
        limit = torch.where(is_window, for_window + 1, for_rest).to(outside.dtype)
        is_member = (outside ^ flip) < limit
        return is_member if token_mask is None else is_member & token_mask[b, token]

    full, partial = schedule.full, schedule.partial
    return BlockMask(
        seq_lengths=(schedule.num_partitions * num_rows, num_tokens),
        kv_num_blocks=partial.num,
        kv_indices=partial.indices,
        full_kv_num_blocks=full.num,
        full_kv_indices=full.indices,
        q_num_blocks=partial.num_q,
        q_indices=partial.indices_q,
        full_q_num_blocks=full.num_q,
        full_q_indices=full.indices_q,
        BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
        mask_mod=mask_mod,
    )


def partition_bias(bias: AttentionBias, schedule: Schedule) -> Tensor:
    """What is added to the scores of every partition: (B, S, P, Q)."""
    values = bias.values.transpose(1, 2)[:, :, None]
    if not schedule.passes[0].has_windows:
        return values.expand(-1, -1, schedule.num_partitions, -1)
    number = torch.arange(schedule.num_partitions, device=values.device)[:, None]
    return torch.where(number == 0, values, 0)
