"""Attention with the bias: one formula, several evaluators, chosen by name.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cmt_aqr.attention.bias import AttentionBias
from cmt_aqr.attention.dense import dense_attention

Backend = Literal["auto", "flex", "dense", "lowrank"]
# out, lse of q (B, M, Q, D) and k, v (B, M, K, D).
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: AttentionBias,
    *,
    backend: Backend = "auto",
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, K, D), tokens in the order of the bias's layout.
        bias: what is added to the scores of a query's windows.
        backend: ``auto``: flex on CUDA, dense elsewhere.
        token_mask: (B, K) bool, True = may be attended to; None: all.

    Returns:
        out (B, M, Q, D) in the dtype of v; lse (B, M, Q) natural logarithm, at least float32. A query that may attend to
        nothing gives 0 and -inf. Gradients reach q, k, v and the strength of the bias.

    Raises:
        ValueError: shapes that do not fit, or a backend that the device cannot run.
    """
    return make_attend(bias, backend=backend, token_mask=token_mask)(q, k, v)


def make_attend(bias: AttentionBias, *, backend: Backend = "auto", token_mask: Tensor | None = None) -> Attend:
    """The attention with this bias as a function of q, k, v; what depends on the bias alone is computed once.

    For several layers that share a bias. Arguments as in :func:`attend`.
    """
    chosen = choose_backend(backend, bias.strength.device)

    def evaluate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        check_shapes(q, k, v, bias, token_mask)
        return dense_attention(q, k, v, bias, token_mask=token_mask)

    return evaluate


def choose_backend(backend: Backend, device: torch.device) -> str:
    """The evaluator that a name means on a device."""
    if backend == "auto":
        return "flex" if device.type == "cuda" else "dense"
    return backend


def check_shapes(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, token_mask: Tensor | None) -> None:
    """Raise ValueError, with the expected and the actual shape, unless everything fits the bias."""
    batch_size, num_queries = bias.windows.batch_and_queries
    num_tokens = bias.windows.layout.num_tokens
    if q.ndim != 4 or (q.shape[0], q.shape[2]) != (batch_size, num_queries):
        raise ValueError(f"q must have shape ({batch_size}, M, {num_queries}, D) to fit the bias, got {tuple(q.shape)}")
    expected = (batch_size, q.shape[1], num_tokens, q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected} to fit q and the token layout, got {tuple(x.shape)}")
    if token_mask is not None and (token_mask.dtype != torch.bool or tuple(token_mask.shape) != expected[::2]):
        raise ValueError(
            f"token_mask must be bool of shape {expected[::2]}, got {token_mask.dtype} {tuple(token_mask.shape)}"
        )
