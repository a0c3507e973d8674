"""The bias as FlexAttention's documentation shows it: a score_mod that looks up where a token lies and adds the bias.

``make_score_mod`` is all that a port to FlexAttention needs. On a GPU gradients reach q, k, v and the bias, the latter
by atomic additions, so they are not reproducible bit for bit. On a CPU the compiled kernel has no lse and no backward
pass.

Shape letters: B batch, M heads, Q queries, G grids, N windows of a query in one grid, K tokens, D channels of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .bias import AttentionBias
from .windows import NO_WINDOW, in_window

MIN_HEAD_DIM = 16
# Combinations of shapes that one process may meet outside a compiled detector.
MAX_SHAPES = 64
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_score_mod(bias: AttentionBias, token_mask: Tensor | None = None) -> ScoreMod:
    """FlexAttention's ``score_mod`` for a bias: score + bias[b, q, k], the same for all heads.

    The windows may be in any grid, and a query may have several in one: the bias acts inside any of them.

    Args:
        bias: its values get gradients; on a CPU the compiled kernel has none.
        token_mask: (B, K) bool, True = may be attended to; a score becomes -inf elsewhere. None: all.
    """
    windows, values, is_local = bias.windows, bias.values, bias.windows.settings.is_local
    # Contiguous: the compiler for CPUs takes no views as captured tensors.
    grid, view, row, col = (x.contiguous() for x in windows.layout.table(values.device))
    radius = torch.cat([torch.full_like(grid[:1], windows.settings.radius(g)) for g in windows.layout.grids])
    # One table (B, Q, G, N, 3) for all grids; grids with fewer windows per query are filled up with NO_WINDOW.
    num_windows = windows.most_per_grid
    centres = [F.pad(cells, (0, 0, 0, num_windows - cells.shape[2]), value=NO_WINDOW) for cells in windows.cells]
    centre_view, centre_row, centre_col = (x.contiguous() for x in torch.stack(centres, dim=2).unbind(-1))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        g = grid[k]
        added = values[b, q, g]
        if is_local:
            inside = torch.zeros_like(k, dtype=torch.bool)
            for n in range(num_windows):
                rows_away, cols_away = row[k] - centre_row[b, q, g, n], col[k] - centre_col[b, q, g, n]
                same_view = view[k] == centre_view[b, q, g, n]
                inside = inside | (same_view & in_window(rows_away, cols_away, radius[g]))
            added = torch.where(inside, added, 0.0)
        score = score + added
        return score if token_mask is None else torch.where(token_mask[b, k], score, -torch.inf)

    return score_mod


def attention_with_score_mod(
    q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(D) + bias) v; see :func:`attend`. On a CPU the lse is None.

    Raises:
        ValueError: a width or dtype that the kernel does not take; gradients on a CPU.
    """
    check_flex_input(q, "score_mod")
    leaves = (q, k, v, bias.values)
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        raise ValueError("the score_mod backend has no backward pass on a CPU; use dense, or torch.no_grad()")
    # The tables are made outside the compiled function: on CUDA, torch 2.11 cannot compile a score_mod whose captured
    # tensors are computed in the same graph. So there this backend does not go inside a larger compiled graph.
    score_mod = make_score_mod(bias, token_mask)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention
    if q.device.type == "cpu":
        return attend(q, k, v, score_mod), None
    # More stages of the kernel's pipeline exceed the shared memory: with several windows, and backward in float32.
    options = {"bwd_num_stages": 1} | ({"num_stages": 1} if bias.windows.most_per_grid > 1 else {})
    out, aux = attend(q, k, v, score_mod, kernel_options=options, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def check_flex_input(q: Tensor, backend: str) -> None:
    """Raise ValueError where FlexAttention has no kernel for queries like q (B, M, Q, D)."""
    if q.shape[-1] < MIN_HEAD_DIM:
        raise ValueError(
            f"the {backend} backend needs heads of at least {MIN_HEAD_DIM} channels, got {q.shape[-1]}; use dense"
        )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the {backend} backend computes in float32, bfloat16 or float16, got {q.dtype}; use dense")


def compile_for_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled anew for every combination of shapes; the compiler's own limit is 8 of them."""
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return compiled(*args, **options)

    return call


# Once for the module, so that all callers share what has been compiled.
_compiled_flex_attention = compile_for_shapes(flex_attention)
