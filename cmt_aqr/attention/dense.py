"""The reference evaluator: the bias written out, ordinary softmax, a few queries at a time.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head.
"""

import math

import torch
from torch import Tensor

from .bias import AttentionBias, is_inside

# Scores of this many queries are computed at a time: few enough for a CPU's cache.
QUERY_CHUNK = 128


def dense_bias(bias: AttentionBias, queries: slice = slice(None)) -> Tensor:
    """The bias (B, Q, K) of these queries, in the dtype of its values."""
    windows, columns = bias.windows, []
    for number, grid in enumerate(windows.layout.grids):
        values = bias.values[:, queries, number, None].expand(-1, -1, grid.num_tokens)
        is_local = windows.settings.is_local
        columns.append(torch.where(is_inside(windows, number, queries), values, 0) if is_local else values)
    return torch.cat(columns, dim=-1)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: AttentionBias | None,
    *,
    token_mask: Tensor | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v; see :func:`attend`, whose arguments these are.

    Args:
        query_chunk: queries whose scores (B, M, chunk, K) are computed at a time; for a backward pass all are kept.
    """
    k, v = k.contiguous(), v.contiguous()  # once, not for every chunk
    outputs, lses = [], []
    for start in range(0, q.shape[2], query_chunk):
        queries = slice(start, start + query_chunk)
        scores = q[:, :, queries] / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
        if bias is not None:
            scores += dense_bias(bias, queries)[:, None].to(scores.dtype)
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask[:, None, None], -math.inf)
        out, lse = softmax_with_lse(scores, v, may_be_masked=token_mask is not None)
        outputs.append(out)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def softmax_with_lse(scores: Tensor, v: Tensor, *, may_be_masked: bool = True) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and the natural-log lse; a row of -inf gives 0 and -inf.

    Args:
        scores: (B, M, Q, K).
        v: (B, M, K, D).
        may_be_masked: False: no row is all -inf, which saves a pass over the scores.

    Returns:
        out (B, M, Q, D) in the dtype of v; lse (B, M, Q), at least float32.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if may_be_masked:  # exp(-inf + inf) otherwise; the output of such a row is set to 0 below
        is_masked = wide.detach().amax(dim=-1, keepdim=True) == -math.inf
        wide = torch.where(is_masked, 0, wide)
    shares = wide.softmax(dim=-1)
    out, lse = shares.to(v.dtype) @ v, _LogSumExp.apply(wide, shares)
    if may_be_masked:
        out, lse = torch.where(is_masked, 0, out), torch.where(is_masked.squeeze(-1), -math.inf, lse)
    return out, lse


class _LogSumExp(torch.autograd.Function):
    """logsumexp of scores (..., K) whose softmax is known: its largest value is exp(largest score - lse)."""

    @staticmethod
    def forward(ctx, scores, shares):
        ctx.save_for_backward(shares)
        return scores.amax(dim=-1) - shares.amax(dim=-1).log()

    @staticmethod
    def backward(ctx, grad):
        (shares,) = ctx.saved_tensors
        return grad[..., None] * shares, None
