"""The reference evaluator: the bias written out, ordinary softmax, a few queries at a time.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head.
"""

import math

import torch
from torch import Tensor

from cmt_aqr.attention.bias import CAMERA, LIDAR, AttentionBias, code_plane, is_inside, token_codes, window_codes

# Scores of this many queries are computed at a time: few enough for a CPU's cache.
QUERY_CHUNK = 128


def dense_bias(bias: AttentionBias, queries: slice = slice(None)) -> Tensor:
    """The bias (B, Q, K) of these queries, in the dtype of its strength."""
    windows, layout = bias.windows, bias.windows.layout
    parts = []
    plane = code_plane(layout, windows.settings)
    codes = token_codes(layout, plane, device=bias.strength.device)
    for modality, tokens in ((LIDAR, slice(0, layout.num_bev)), (CAMERA, slice(layout.num_bev, layout.num_tokens))):
        num_tokens = tokens.stop - tokens.start
        if num_tokens == 0:
            continue
        strength = bias.strength[:, queries, modality, None]
        if windows.settings.is_local:
            centres = window_codes(windows, plane, modality)[:, queries]
            inside = is_inside(codes[tokens], centres[..., None], plane).any(dim=2)
            parts.append(torch.where(inside, strength, 0))
        else:
            parts.append(strength.expand(-1, -1, num_tokens))
    return torch.cat(parts, dim=-1)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: AttentionBias | None,
    *,
    token_mask: Tensor | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v; see :func:`cmt_aqr.attention.attend`, whose arguments these are.

    Args:
        query_chunk: queries whose scores (B, M, chunk, K) are computed at a time; for a backward pass all are kept.
    """
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
    if may_be_masked:  # exp(-inf + inf) otherwise; a row of 0 is like others, and is taken out below
        is_masked = wide.detach().amax(dim=-1, keepdim=True) == -math.inf
        wide = torch.where(is_masked, 0, wide)
    shares = wide.softmax(dim=-1)
    out, lse = shares.to(v.dtype) @ v, _LogSumExp.apply(wide, shares)
    if may_be_masked:
        out, lse = torch.where(is_masked, 0, out), torch.where(is_masked.squeeze(-1), -math.inf, lse)
    return out, lse


class _LogSumExp(torch.autograd.Function):
    """logsumexp of scores (..., K) whose softmax is at hand: the largest share is exp(largest score - lse)."""

    @staticmethod
    def forward(ctx, scores, shares):
        ctx.save_for_backward(shares)
        return scores.amax(dim=-1) - shares.amax(dim=-1).log()

    @staticmethod
    def backward(ctx, grad):
        (shares,) = ctx.saved_tensors
        return grad[..., None] * shares, None
