"""The fast evaluator: one FlexAttention kernel over parts of the keys, put together by their lse.

    out = sum_p w_p out_p,   w_p = exp(lse_p + bias_p - lse),   lse = log sum_p exp(lse_p + bias_p)

where part p is a query's window (bias_p: the query's bias there) or a share of the other keys (bias_p = 0). This is
softmax(q k^T / sqrt(D) + bias) v exactly, whatever the sign and size of the bias, and the bias's gradient is that of a
sum of P numbers: no atomics, the same bits in every run. ``schedule.py`` says what the parts are and why this is fast.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head, P parts, R sorted rows.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from cmt_aqr.attention.bias import CAMERA, LIDAR, AttentionBias
from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.schedule import Schedule, make_schedule
from cmt_aqr.attention.windows import QueryWindows

# Sizes of blocks and tiles change the speed, and the numbers by rounding only. Measured on an H200 with D = 32:
# docs/benchmarks.md.
BLOCK_Q = 64
BLOCK_K = 128
# Parts of the LiDAR tokens and of the camera tokens outside windows.
SPLITS = (5, 3)
# Up to this many programs of BLOCK_Q queries, and from this many tokens on, wide tiles of keys are faster.
FEW_PROGRAMS = 256
MANY_TOKENS = 32_768
MIN_HEAD_DIM = 16


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
    """
    check_flex(q)
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
    rows = _Sort.apply(q, schedule.order, schedule.rank).flatten(1, 2)
    out, aux = flex_attention(
        rows,
        k,
        v,
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=kernel_options(q, k),
    )
    split = (q.shape[1], len(schedule.parts))
    lse = aux.lse.unflatten(1, split)
    added = part_bias(bias, schedule).to(lse.dtype)
    return _Merge.apply(out.unflatten(1, split), lse, added, schedule.order, schedule.rank)


# Once for the module: a compiler cache per call site would fill up. The shapes are few and constant.
_compiled_schedule = torch.compile(make_schedule, dynamic=False, fullgraph=True)
_compiled_attention = torch.compile(attend_to_parts, dynamic=False, fullgraph=True)


def kernel_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Tiles for these shapes and this dtype.

    The runs of blocks are contiguous for a block of queries (the forward pass), not for a block of keys (the backward
    pass). In half precision q is scaled before the product, which saves a multiplication per score and a tenth of the
    time; q is rounded once more, which shows in the lse (by half an ulp of a score) more than in the output.
    """
    options: dict[str, Any] = {"fwd_BLOCKS_ARE_CONTIGUOUS": True, "PRESCALE_QK": q.dtype != torch.float32}
    if q.dtype == torch.float32:
        forward, backward, num_stages = (64, 64), (32, 64, 32, 32), 1
    else:
        num_programs = q.shape[0] * q.shape[1] * -(-q.shape[2] // BLOCK_Q)
        is_wide = num_programs <= FEW_PROGRAMS or k.shape[2] >= MANY_TOKENS
        forward, backward = (64, 128 if is_wide else 64), (32, 128, 64, 64)
        num_stages = 3 if q.shape[3] <= 64 else 2
    options |= dict(zip(("fwd_BLOCK_M", "fwd_BLOCK_N"), forward, strict=True))
    options |= dict(zip(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), backward, strict=True))
    return options | {"num_stages": num_stages, "num_warps": 4}


def make_block_mask(schedule: Schedule, num_tokens: int, token_mask: Tensor | None = None) -> BlockMask:
    """The mask of the parts; "head" h of the kernel is part h % P of key head h // P.

    Args:
        schedule: of the windows.
        num_tokens: length of the token axis, padded or not.
        token_mask: (B, K) bool, True = may be attended to.
    """
    parts = schedule.parts
    num_parts, num_windows = len(parts), schedule.window_codes.shape[-1]
    token_codes, token_bits, centres = schedule.token_codes, schedule.token_bits, schedule.window_codes
    first_window = next((i for i, part in enumerate(parts) if part.kind == "window"), num_parts)

    def belongs(b: Tensor, h: Tensor, row: Tensor, token: Tensor) -> Tensor:
        part = h % num_parts
        code, bits = token_codes[part, token], token_bits[part, token]
        outside = (code - centres[b, part, row, 0]) & bits
        for n in range(1, num_windows):
            # Outside the union: outside every window.
            outside = torch.where((code - centres[b, part, row, n]) & bits == 0, 0, outside)
        # A key belongs to a window part if the bits are 0, to another if they are not: x < 1, or -1 - x < -1.
        is_window = part >= first_window
        flip, limit = (torch.where(is_window, *pair).to(outside.dtype) for pair in ((0, -1), (1, -1)))
        is_member = (outside ^ flip) < limit
        return is_member if token_mask is None else is_member & token_mask[b, token]

    full, partial = schedule.full, schedule.partial
    return BlockMask(
        seq_lengths=(schedule.order.shape[-1], num_tokens),
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
    """Queries (B, M, Q, D) -> rows of every part (B, M, P, R, D). A gather both ways, so there are no atomics."""

    @staticmethod
    def forward(ctx, queries, order, rank):
        ctx.save_for_backward(rank)
        return _take_rows(queries, order)

    @staticmethod
    def backward(ctx, grad):
        (rank,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        # Unrolled, so that it becomes one elementwise kernel instead of a reduction.
        total = sum(_take(grad[:, :, p], rank[:, p]).to(wide) for p in range(rank.shape[1]))
        return total.to(grad.dtype), None, None


class _Merge(torch.autograd.Function):
    """One attention from those over disjoint keys: out_p (B, M, P, R, D), lse_p (B, M, P, R), added (B, P, Q).

    With w_p = exp(lse_p + added_p - lse) the gradients are w_p dO for out_p and, for lse_p and added_p,
    w_p (dO . out_p - dO . out + dlse). Rows that repeat a query get none.
    """

    @staticmethod
    def forward(ctx, part_out, part_lse, added, order, rank):
        num_parts = rank.shape[1]
        lses = [_take(part_lse[:, :, p], rank[:, p]) + added[:, p, None] for p in range(num_parts)]
        top = lses[0]
        for lse in lses[1:]:
            top = torch.maximum(top, lse)
        top = torch.where(top == -math.inf, 0, top)
        total = sum(torch.exp(lse - top) for lse in lses)
        is_empty = total == 0
        lse = torch.where(is_empty, -math.inf, top + torch.log(torch.where(is_empty, 1, total)))
        weights = _weights(part_lse, added, lse, rank)
        outs = [_take(part_out[:, :, p], rank[:, p]) for p in range(num_parts)]
        out = sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))
        if out.dtype != part_out.dtype:  # a cast that changes nothing loses the gradient in a graph of torch 2.11
            out = out.to(part_out.dtype)
        ctx.save_for_backward(part_out, part_lse, added, order, rank, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        part_out, part_lse, added, order, rank, out, lse = ctx.saved_tensors
        num_queries = rank.shape[2]
        is_query = torch.arange(order.shape[2], device=order.device) < num_queries
        common = grad_lse - (grad_out * out).sum(dim=-1, dtype=lse.dtype)
        rows = _take_rows(grad_out, order)
        shifted = part_lse + added.gather(2, order)[:, None]
        lse = torch.where(lse == -math.inf, 0, lse)
        weight = torch.where(is_query, torch.exp(shifted - _take_rows(lse, order)), 0)
        inner = (rows * part_out).sum(dim=-1, dtype=lse.dtype)
        grad_part_lse = weight * (inner + _take_rows(common, order))
        at = rank[:, None].expand(-1, part_lse.shape[1], -1, -1)
        grad_added = grad_part_lse.gather(3, at).sum(dim=1)
        return (weight[..., None] * rows).to(part_out.dtype), grad_part_lse, grad_added, None, None


def _weights(part_lse: Tensor, added: Tensor, lse: Tensor, rank: Tensor) -> list[Tensor]:
    """Share (B, M, Q) of every part in the softmax; 0 for all where lse is -inf."""
    lse = torch.where(lse == -math.inf, 0, lse)
    return [torch.exp(_take(part_lse[:, :, p], rank[:, p]) + added[:, p, None] - lse) for p in range(rank.shape[1])]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, X, ...) at index (B, Y) -> (B, M, Y, ...)."""
    index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(*index.shape, x.shape[-1]))


def _take_rows(x: Tensor, order: Tensor) -> Tensor:
    """x (B, M, Q, ...) in the order (B, P, R) of every part -> (B, M, P, R, ...)."""
    x = x[:, :, None].expand(-1, -1, order.shape[1], *x.shape[2:])
    index = order[:, None].expand(-1, x.shape[1], -1, -1)
    return x.gather(3, index if x.ndim == 4 else index[..., None].expand(*index.shape, x.shape[-1]))


def part_bias(bias: AttentionBias, schedule: Schedule) -> Tensor:
    """What is added to the scores of every part: (B, P, Q)."""
    added = torch.zeros_like(bias.strength[:, None, :, 0])
    number = torch.arange(len(schedule.parts), device=bias.strength.device)[:, None]
    # Biased parts of a modality lie side by side. Comparing numbers is one kernel for all parts; stacking is several.
    for modality in (LIDAR, CAMERA):
        biased = [i for i, part in enumerate(schedule.parts) if part.is_biased and part.modality == modality]
        if biased:
            is_biased = (number >= biased[0]) & (number <= biased[-1])
            added = torch.where(is_biased, bias.strength[:, None, :, modality], added)
    return added.expand(-1, len(schedule.parts), -1)
