"""The fast evaluator: one FlexAttention kernel over parts of the keys, put together by their lse.

    out = sum_p w_p out_p,   w_p = exp(lse_p + bias_p - lse),   lse = log sum_p exp(lse_p + bias_p)

where part p is a query's window (bias_p: the query's bias there) or a share of the other keys (bias_p = 0). This is
softmax(q k^T / sqrt(D) + bias) v exactly, whatever the sign and size of the bias, and the bias's gradient is that of a
sum of a few numbers: no atomics, the same bits in every run. ``schedule.py`` says what the parts are and why this is
fast.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head, S sides, G parts on a side, R sorted rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from cmt_aqr.attention.bias import AttentionBias
from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.schedule import Schedule, make_schedule
from cmt_aqr.attention.windows import QueryWindows

# Sizes of blocks and tiles change the speed, and the numbers by rounding only. Measured on an H200 with D = 32:
# docs/benchmarks.md.
BLOCK_Q = 64
BLOCK_K = 128
# Parts of the LiDAR tokens and of the camera tokens outside windows.
SPLITS = (5, 4)
# Up to this many blocks of queries, of all heads and samples, wide tiles of keys are faster.
FEW_BLOCKS = 256
MIN_HEAD_DIM = 16
# Combinations of shapes that one process may meet outside a compiled detector.
MAX_SHAPES = 64


def padded_length(layout: TokenLayout) -> int:
    """Length of the token axis with which the kernel needs no check at its end: K up to whole blocks."""
    return -(-layout.num_tokens // BLOCK_K) * BLOCK_K


def check_flex(q: Tensor) -> None:
    """Raise ValueError where the kernel does not exist."""
    if q.device.type != "cuda":
        raise ValueError(f"the flex backend needs a CUDA GPU, got tensors on {q.device}; use dense")
    if q.shape[-1] < MIN_HEAD_DIM:
        raise ValueError(
            f"the flex backend needs heads of at least {MIN_HEAD_DIM} channels, got {q.shape[-1]}; use dense"
        )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the flex backend computes in float32, bfloat16 or float16, got {q.dtype}; use dense")


def check_schedule(schedule: Schedule, q: Tensor, token_mask: Tensor | None) -> None:
    """Raise ValueError where results would be wrong without a word."""
    planned = (schedule.rank.shape[0], schedule.rank.shape[2])
    if planned != (q.shape[0], q.shape[2]):
        raise ValueError(f"the schedule is for batch and queries {planned}, q has {(q.shape[0], q.shape[2])}")
    if schedule.has_token_mask != (token_mask is not None):
        made, got = ("with" if x else "without" for x in (schedule.has_token_mask, token_mask is not None))
        raise ValueError(f"the schedule was made {made} a token mask and is used {got} one")


def plan_flex(windows: QueryWindows, *, has_token_mask: bool = False) -> Schedule:
    """What all layers that share the windows share."""
    plan = make_schedule if torch.compiler.is_compiling() else _compiled_schedule
    with torch.no_grad():
        return plan(windows, block_q=BLOCK_Q, block_k=BLOCK_K, splits=SPLITS, has_token_mask=has_token_mask)


def flex_attention_with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, schedule: Schedule, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v; see :func:`cmt_aqr.attention.attend`.

    Args:
        schedule: of :func:`plan_flex` for the windows of the bias.

    Raises:
        ValueError: tensors that the kernel does not take, or a schedule that was made for something else.
    """
    check_flex(q)
    check_schedule(schedule, q, token_mask)
    # Without the compiler FlexAttention would ignore the runs of blocks, which the parts rely on.
    evaluate = attend_to_parts if torch.compiler.is_compiling() else _compiled_attention
    return evaluate(q, k, v, bias, schedule, token_mask)


def attend_to_parts(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, schedule: Schedule, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The evaluator as the compiler sees it."""
    if token_mask is not None:
        token_mask = nn.functional.pad(token_mask, (0, k.shape[2] - token_mask.shape[1]))
    block_mask = make_block_mask(schedule, k.shape[2], token_mask)
    rows = _Sort.apply(q, schedule.order, schedule.rank, schedule.num_parts)
    out, aux = flex_attention(
        rows.flatten(3, 4).flatten(1, 2),
        k,
        v,
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=kernel_options(q),
    )
    part_out, part_lse = (x.unflatten(2, rows.shape[3:5]).unflatten(1, rows.shape[1:3]) for x in (out, aux.lse))
    added = part_bias(bias, schedule).to(part_lse.dtype)
    used = tuple((s, g) for s, side in enumerate(schedule.sides) for g in range(side.num_parts))
    return _Merge.apply(part_out, part_lse, added, schedule.order, schedule.rank, used)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled anew for every combination of shapes; the compiler's own limit is 8 of them."""
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return compiled(*args, **options)

    return call


# Once for the module, so that all callers share what has been compiled.
_compiled_schedule = _compiled(make_schedule)
_compiled_attention = _compiled(attend_to_parts)


def kernel_options(q: Tensor) -> dict[str, Any]:
    """Tiles for these shapes and this dtype.

    The runs of blocks are contiguous for a block of queries (the forward pass), not for a block of keys (the backward
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
    """The mask of the parts; "head" h of the kernel is side h % S of key head h // S, "query" i is row i % R of a part.

    Args:
        schedule: of the windows.
        num_tokens: length of the token axis, padded or not.
        token_mask: (B, K) bool, True = may be attended to.
    """
    plane, token_codes, centres = schedule.plane, schedule.token_codes, schedule.window_codes
    num_sides, num_rows, num_windows = centres.shape[1:]
    has_windows = schedule.sides[0].has_windows
    # What 0, numbers up to 2 high and numbers from there on become: the wanted ones are below, the others not.
    lowest = torch.iinfo(plane.dtype).min
    for_window, for_rest = lowest, -2 * plane.high - 1

    def belongs(b: Tensor, h: Tensor, i: Tensor, token: Tensor) -> Tensor:
        side, row = h % num_sides, i % num_rows
        code = token_codes[side, token]
        outside = ((code - centres[b, side, row, 0]) & plane.outside) ^ plane.high
        for n in range(1, num_windows):
            # Inside the union: inside any window.
            other = ((code - centres[b, side, row, n]) & plane.outside) ^ plane.high
            outside = torch.minimum(outside, other)
        is_window = i < num_rows if has_windows else i < 0
        flip = torch.where(is_window, for_window, for_rest).to(outside.dtype)
        limit = torch.where(is_window, for_window + 1, for_rest).to(outside.dtype)
        is_member = (outside ^ flip) < limit
        return is_member if token_mask is None else is_member & token_mask[b, token]

    full, partial = schedule.full, schedule.partial
    return BlockMask(
        seq_lengths=(schedule.num_parts * num_rows, num_tokens),
        kv_num_blocks=partial.num,
        kv_indices=partial.indices,
        full_kv_num_blocks=full.num,
        full_kv_indices=full.indices,
        q_num_blocks=partial.num_q,
        q_indices=partial.indices_q,
        full_q_num_blocks=full.num_q,
        full_q_indices=full.indices_q,
        BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
        mask_mod=belongs,
    )


class _Sort(torch.autograd.Function):
    """Queries (B, M, Q, D) -> rows of every part (B, M, S, G, R, D). A gather both ways, so there are no atomics."""

    @staticmethod
    def forward(ctx, queries, order, rank, num_parts):
        ctx.save_for_backward(rank)
        return _take_rows(queries, order, num_parts)

    @staticmethod
    def backward(ctx, grad):
        (rank,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        # Unrolled, so that it becomes one elementwise kernel instead of a reduction.
        places = [(s, g) for s in range(grad.shape[2]) for g in range(grad.shape[3])]
        total = sum(_take(grad[:, :, s, g], rank[:, s]).to(wide) for s, g in places)
        return total.to(grad.dtype), None, None, None


class _Merge(torch.autograd.Function):
    """One attention from those over disjoint keys.

    With w_p = exp(lse_p + added_p - lse) the gradients are w_p dO for out_p and, for lse_p and added_p,
    w_p (dO . out_p - dO . out + dlse). Rows that repeat a query get none.

    part_out (B, M, S, G, R, D), part_lse (B, M, S, G, R), added (B, S, G, Q); used: the (side, part) that have keys.
    """

    @staticmethod
    def forward(ctx, part_out, part_lse, added, order, rank, used):
        lses = [_take(part_lse[:, :, s, g], rank[:, s]) + added[:, s, g, None] for s, g in used]
        top = lses[0]
        for lse in lses[1:]:
            top = torch.maximum(top, lse)
        top = torch.where(top == -math.inf, 0, top)
        total = sum(torch.exp(lse - top) for lse in lses)
        is_empty = total == 0
        lse = torch.where(is_empty, -math.inf, top + torch.log(torch.where(is_empty, 1, total)))
        common = torch.where(is_empty, 0, lse)
        out = 0
        for s, g in used:
            weight = torch.exp(_take(part_lse[:, :, s, g], rank[:, s]) + added[:, s, g, None] - common)
            out = out + weight[..., None] * _take(part_out[:, :, s, g], rank[:, s])
        if out.dtype != part_out.dtype:  # a cast that changes nothing loses the gradient in a graph of torch 2.11
            out = out.to(part_out.dtype)
        ctx.save_for_backward(part_out, part_lse, added, order, rank, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        part_out, part_lse, added, order, rank, out, lse = ctx.saved_tensors
        num_parts, num_queries = added.shape[2:]
        is_query = torch.arange(order.shape[2], device=order.device) < num_queries
        # Products in full precision: the two sums nearly cancel.
        common = grad_lse - (grad_out.to(lse.dtype) * out).sum(dim=-1)
        rows = _take_rows(grad_out, order, num_parts)
        at = order[:, :, None].expand(-1, -1, num_parts, -1)
        shifted = part_lse + added.gather(3, at)[:, None]
        lse = torch.where(lse == -math.inf, 0, lse)
        weight = torch.where(is_query, torch.exp(shifted - _take_rows(lse, order, num_parts)), 0)
        inner = (rows.to(lse.dtype) * part_out).sum(dim=-1)
        grad_part_lse = weight * (inner + _take_rows(common, order, num_parts))
        at = rank[:, None, :, None].expand(-1, part_lse.shape[1], -1, num_parts, -1)
        grad_added = grad_part_lse.gather(4, at).sum(dim=1)
        return (weight[..., None] * rows).to(part_out.dtype), grad_part_lse, grad_added, None, None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, X, ...) at index (B, Y) -> (B, M, Y, ...)."""
    index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(*index.shape, x.shape[-1]))


def _take_rows(x: Tensor, order: Tensor, num_parts: int) -> Tensor:
    """x (B, M, Q, ...) in the order (B, S, R) of every side, once per part -> (B, M, S, G, R, ...)."""
    num_heads, num_sides = x.shape[1], order.shape[1]
    x = x[:, :, None, None].expand(-1, -1, num_sides, num_parts, *x.shape[2:])
    index = order[:, None, :, None].expand(-1, num_heads, -1, num_parts, -1)
    return x.gather(4, index if x.ndim == 5 else index[..., None].expand(*index.shape, x.shape[-1]))


def part_bias(bias: AttentionBias, schedule: Schedule) -> Tensor:
    """What is added to the scores of every part: (B, S, G, Q)."""
    strength = torch.stack([bias.strength[..., side.modality] for side in schedule.sides], dim=1)[:, :, None]
    if not schedule.sides[0].has_windows:
        return strength.expand(-1, -1, schedule.num_parts, -1)
    number = torch.arange(schedule.num_parts, device=strength.device)[:, None]
    return torch.where(number == 0, strength, 0)
