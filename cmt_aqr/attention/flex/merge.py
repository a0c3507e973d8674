"""One attention from those over disjoint partitions of the keys, and the sorted rows that it reads.

    out = sum_p w_p out_p,   w_p = exp(lse_p + added_p - lse),   lse = log sum_p exp(lse_p + added_p)

where partition p is a query's window (added_p: the query's bias there) or some of the other keys (added_p = 0). This
is softmax(q k^T / sqrt(D) + bias) v exactly, whatever the sign and size of the bias, and the bias's gradient is that of
a sum of a few numbers: no atomics, reproducible bit for bit.

Shape letters: B batch, M heads, Q queries, D channels of a head, S grid passes, P partitions of a pass, R sorted rows.
"""

import math

import torch
from torch import Tensor


def sort_into_rows(queries: Tensor, order: Tensor, rank: Tensor, num_partitions: int) -> Tensor:
    """Queries (B, M, Q, D) -> rows of every partition (B, M, S, P, R, D); order (B, S, R) and its inverse (B, S, Q)."""
    return _Sort.apply(queries, order, rank, num_partitions)


def merge_partitions(
    out_p: Tensor, lse_p: Tensor, added: Tensor, order: Tensor, rank: Tensor, used: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor]:
    """One attention from those over disjoint keys.

    Args:
        out_p, lse_p: (B, M, S, P, R, D), (B, M, S, P, R) of the partitions.
        added: (B, S, P, Q).
        order, rank: as in :func:`sort_into_rows`.
        used: the (pass, partition) pairs that have keys.

    Returns:
        out (B, M, Q, D), lse (B, M, Q).
    """
    return _Merge.apply(out_p, lse_p, added, order, rank, used)


class _Sort(torch.autograd.Function):
    """A gather both ways, so there are no atomics."""

    @staticmethod
    def forward(ctx, queries, order, rank, num_partitions):
        ctx.save_for_backward(rank)
        return _take_rows(queries, order, num_partitions)

    @staticmethod
    def backward(ctx, grad):
        (rank,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        # Unrolled, so that it becomes one elementwise kernel instead of a reduction.
        pairs = [(s, p) for s in range(grad.shape[2]) for p in range(grad.shape[3])]
        total = sum(_take(grad[:, :, s, p], rank[:, s]).to(wide) for s, p in pairs)
        return total.to(grad.dtype), None, None, None


class _Merge(torch.autograd.Function):
    """The gradients are w_p dO for out_p and w_p (dO . out_p - dO . out + dlse) for lse_p and added_p.

    Padding rows, which repeat a query, get none.
    """

    @staticmethod
    def forward(ctx, out_p, lse_p, added, order, rank, used):
        lses = [_take(lse_p[:, :, s, p], rank[:, s]) + added[:, s, p, None] for s, p in used]
        top = lses[0]
        for lse in lses[1:]:
            top = torch.maximum(top, lse)
        top = torch.where(top == -math.inf, 0, top)
        total = sum(torch.exp(lse - top) for lse in lses)
        is_empty = total == 0
        lse = torch.where(is_empty, -math.inf, top + torch.log(torch.where(is_empty, 1, total)))
        common = torch.where(is_empty, 0, lse)
        out = 0
        for s, p in used:
            weight = torch.exp(_take(lse_p[:, :, s, p], rank[:, s]) + added[:, s, p, None] - common)
            out = out + weight[..., None] * _take(out_p[:, :, s, p], rank[:, s])
        if out.dtype != out_p.dtype:  # a cast that changes nothing loses the gradient in a graph of torch 2.11
            out = out.to(out_p.dtype)
        ctx.save_for_backward(out_p, lse_p, added, order, rank, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        out_p, lse_p, added, order, rank, out, lse = ctx.saved_tensors
        num_partitions, num_queries = added.shape[2:]
        is_query = torch.arange(order.shape[2], device=order.device) < num_queries
        # Products in full precision: the two sums nearly cancel.
        common = grad_lse - (grad_out.to(lse.dtype) * out).sum(dim=-1)
        rows = _take_rows(grad_out, order, num_partitions)
        at = order[:, :, None].expand(-1, -1, num_partitions, -1)
        shifted = lse_p + added.gather(3, at)[:, None]
        lse = torch.where(lse == -math.inf, 0, lse)
        weight = torch.where(is_query, torch.exp(shifted - _take_rows(lse, order, num_partitions)), 0)
        inner = (rows.to(lse.dtype) * out_p).sum(dim=-1)
        grad_lse_p = weight * (inner + _take_rows(common, order, num_partitions))
        at = rank[:, None, :, None].expand(-1, lse_p.shape[1], -1, num_partitions, -1)
        grad_added = grad_lse_p.gather(4, at).sum(dim=1)
        return (weight[..., None] * rows).to(out_p.dtype), grad_lse_p, grad_added, None, None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, X, ...) at index (B, Y) -> (B, M, Y, ...)."""
    index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(*index.shape, x.shape[-1]))


def _take_rows(x: Tensor, order: Tensor, num_partitions: int) -> Tensor:
    """x (B, M, Q, ...) in the order (B, S, R) of every pass, once per partition -> (B, M, S, P, R, ...)."""
    num_heads, num_passes = x.shape[1], order.shape[1]
    x = x[:, :, None, None].expand(-1, -1, num_passes, num_partitions, *x.shape[2:])
    index = order[:, None, :, None].expand(-1, num_heads, -1, num_partitions, -1)
    return x.gather(4, index if x.ndim == 5 else index[..., None].expand(*index.shape, x.shape[-1]))
