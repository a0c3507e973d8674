"""Attention with the bias: one formula, several evaluators, chosen by name.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from cmt_aqr.attention.bias import AttentionBias
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.attention.flex import flex_attention_with_bias, padded_length, plan_flex
from cmt_aqr.attention.lowrank import ENERGY, factored_attention, factorise

Backend = Literal["auto", "flex", "dense", "lowrank"]
BACKENDS = get_args(Backend)
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
    energy: float = ENERGY,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, K, D), tokens in the order of the bias's layout; K may be padded to ``padded_length(layout)``.
        bias: what is added to the scores of a query's windows.
        backend: ``flex``, ``dense``, ``lowrank`` (comparison only), or ``auto``: flex on CUDA, dense elsewhere.
        token_mask: (B, num_tokens) bool, True = may be attended to; None: all.
        energy: of ``lowrank``: share of the bias's squared singular values that is kept.

    Returns:
        out (B, M, Q, D) in the dtype of v; lse (B, M, Q) natural logarithm, at least float32. A query that may attend
        to nothing gives 0 and -inf. Gradients reach q, k, v and, but for ``lowrank``, the strength of the bias.

    Raises:
        ValueError: shapes that do not fit, or a backend that is unknown or that the device cannot run.
    """
    return make_attend(bias, backend=backend, token_mask=token_mask, energy=energy)(q, k, v)


def make_attend(
    bias: AttentionBias,
    *,
    backend: Backend = "auto",
    token_mask: Tensor | None = None,
    energy: float = ENERGY,
) -> Attend:
    """The attention with this bias as a function of q, k, v; what depends on the bias alone is computed once.

    For several layers that share a bias. Arguments as in :func:`attend`.
    """
    chosen = choose_backend(backend, bias.strength.device)
    num_tokens = bias.windows.layout.num_tokens
    if chosen == "flex":
        schedule = plan_flex(bias.windows, has_token_mask=token_mask is not None)
    elif chosen == "lowrank":
        factors = factorise(bias, energy)

    def evaluate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        check_shapes(q, k, v, bias, token_mask)
        if chosen == "flex":
            return flex_attention_with_bias(q, k, v, bias, schedule, token_mask=token_mask)
        k, v = k[:, :, :num_tokens], v[:, :, :num_tokens]
        if chosen == "lowrank":
            return factored_attention(q, k, v, factors, token_mask=token_mask)
        return dense_attention(q, k, v, bias, token_mask=token_mask)

    return evaluate


def choose_backend(backend: Backend, device: torch.device) -> str:
    """The evaluator that a name means on a device.

    Raises:
        ValueError: an unknown name, or flex without a GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "flex" and device.type != "cuda":
        raise ValueError(f"the flex backend needs a CUDA GPU, got tensors on {device}; use dense")
    if backend == "auto":
        return "flex" if device.type == "cuda" else "dense"
    return backend


def check_shapes(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, token_mask: Tensor | None) -> None:
    """Raise ValueError, with the expected and the actual shape, unless everything fits the bias."""
    batch_size, num_queries = bias.windows.batch_and_queries
    layout = bias.windows.layout
    if q.ndim != 4 or (q.shape[0], q.shape[2]) != (batch_size, num_queries):
        raise ValueError(f"q must have shape ({batch_size}, M, {num_queries}, D) to fit the bias, got {tuple(q.shape)}")
    padded = k.ndim == 4 and k.shape[2] == padded_length(layout)
    expected = (batch_size, q.shape[1], padded_length(layout) if padded else layout.num_tokens, q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected} to fit q and the token layout, got {tuple(x.shape)}")
    expected = (batch_size, layout.num_tokens)
    if token_mask is not None and (token_mask.dtype != torch.bool or tuple(token_mask.shape) != expected):
        raise ValueError(
            f"token_mask must be bool of shape {expected}, got {token_mask.dtype} {tuple(token_mask.shape)}"
        )
