"""Attention with the bias: one formula, several evaluators, chosen by name.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from .bias import AttentionBias
from .dense import dense_attention
from .score_mod import attention_with_score_mod

Backend = Literal["auto", "flex", "score_mod", "dense"]
BACKENDS = get_args(Backend)
# The folder flex/ may be deleted, it only adds speed; without it `auto` means score_mod on a GPU.
HAS_FLEX = find_spec(f"{__package__}.flex") is not None
# out, lse of q (B, M, Q, D) and k, v (B, M, K, D).
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, *, backend: Backend = "auto", token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, K, D), tokens in the order of the bias's layout; K may be padded to ``layout.padded_length``.
        bias: what is added to the scores of a query's windows.
        backend: ``flex``, ``score_mod``, ``dense``, or ``auto``: flex on CUDA, dense elsewhere.
        token_mask: (B, num_tokens) bool, True = may be attended to; None: all.

    Returns:
        out (B, M, Q, D) in the dtype of v; lse (B, M, Q) natural logarithm, at least float32, None from ``score_mod``
        on a CPU. A query that may attend to nothing gives 0 and -inf. Gradients reach q, k, v and the values of the
        bias.

    Raises:
        ValueError: shapes that do not fit, or a backend that is unknown or that the device cannot run.
    """
    return make_attend(bias, backend=backend, token_mask=token_mask)(q, k, v)


def make_attend(bias: AttentionBias, *, backend: Backend = "auto", token_mask: Tensor | None = None) -> AttendWithLse:
    """The attention with this bias as a function of q, k, v; what depends on the bias alone is computed once.

    For several layers that share a bias. Arguments as in :func:`attend`.
    """
    chosen = choose_backend(backend, bias.values.device)
    num_tokens = bias.windows.layout.num_tokens
    if chosen == "flex":
        from .flex import make_flex_attention  # imported here only, so that the folder can be deleted

        with_flex = make_flex_attention(bias, token_mask)

    def evaluate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        check_shapes(q, k, v, bias, token_mask)
        if chosen == "flex":
            return with_flex(q, k, v)
        k, v = k[:, :, :num_tokens], v[:, :, :num_tokens]
        function = attention_with_score_mod if chosen == "score_mod" else dense_attention
        return function(q, k, v, bias, token_mask=token_mask)

    return evaluate


def choose_backend(backend: Backend, device: torch.device) -> str:
    """The evaluator that a name means on a device.

    Raises:
        ValueError: an unknown name, or flex without a GPU or without its folder.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "dense" if device.type != "cuda" else "flex" if HAS_FLEX else "score_mod"
    if backend == "flex" and device.type != "cuda":
        raise ValueError(f"the flex backend needs a CUDA GPU, got tensors on {device}; use dense")
    if backend == "flex" and not HAS_FLEX:
        raise ValueError("the flex backend needs the folder attention/flex, which is not there; use score_mod")
    return backend


def check_shapes(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, token_mask: Tensor | None) -> None:
    """Raise ValueError, with the expected and the actual shape, unless everything fits the bias."""
    batch_size, num_queries = bias.windows.batch_and_queries
    layout = bias.windows.layout
    if q.ndim != 4 or (q.shape[0], q.shape[2]) != (batch_size, num_queries):
        raise ValueError(f"q must have shape ({batch_size}, M, {num_queries}, D) to fit the bias, got {tuple(q.shape)}")
    is_padded = k.ndim == 4 and k.shape[2] == layout.padded_length
    expected = (batch_size, q.shape[1], layout.padded_length if is_padded else layout.num_tokens, q.shape[3])
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
