"""The layers around an attention function: its projections, and the feed-forward network.

Shape letters: B batch, Q queries, K tokens, C channels, M heads, D = C / M.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# softmax(q k^T / sqrt(D) + ...) v with q (B, M, Q, D) and k, v (B, M, K, D) -> (B, M, Q, D), heads first.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Order of the projections in `Attention.in_proj_weight`.
QUERY, KEY, VALUE = range(3)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, M, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, M, N, D) -> (B, N, C), the inverse of :func:`split_heads`."""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """The projections around an attention function; weights laid out as in ``nn.MultiheadAttention``.

    Args:
        dim: C.
        num_heads: M, divides C.
    """

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention needs a width that its heads divide, got dim {dim} and {num_heads} heads")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Project query (B, Q, C), key and value (B, K, C), attend, project back: (B, Q, C)."""
        return self.attend_to(query, self.project(KEY, key), self.project(VALUE, value), attend)

    def attend_to(self, query: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Query (B, Q, C) to keys and values (B, M, K, D) that are projected already -> (B, Q, C)."""
        return self.out_proj(merge_heads(attend(self.project(QUERY, query), k, v)))

    def project(self, part: int, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, N, D), by the projection of QUERY, KEY or VALUE."""
        return split_heads(F.linear(x, *self.projection(part)), self.num_heads)

    def projection(self, part: int) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C,) of QUERY, KEY or VALUE."""
        return self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]


def project_for_all(attentions: Sequence[Attention], part: int, x: Tensor) -> list[Tensor]:
    """The same tokens (B, K, C) projected by each of several attentions, (B, M, K, D) each, in one product.

    Args:
        attentions: of one width and number of heads.
        part: KEY or VALUE.
    """
    weights, biases = zip(*(attention.projection(part) for attention in attentions), strict=True)
    parts = F.linear(x, torch.cat(weights), torch.cat(biases)).chunk(len(attentions), dim=-1)
    return [split_heads(part, attentions[0].num_heads) for part in parts]


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, *, attention_mask: Tensor | None, dropout: float) -> Tensor:
    """``F.scaled_dot_product_attention`` in single operations: q (B, M, Q, D), k and v (B, M, K, D) -> (B, M, Q, D).

    For compiled layers that the backward pass recomputes: torch 2.11's fused kernel on CUDA draws another dropout there
    than in the forward pass, so its gradients are wrong. It holds the probabilities (B, M, Q, K).

    Args:
        attention_mask: bool, broadcastable to (B, M, Q, K), True = may attend; None: all may.
        dropout: probability that a probability becomes 0; the others grow by 1 / (1 - dropout).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    probabilities = scores.softmax(-1)
    # Not F.dropout, which the compiler would recognise and put the fused kernel back.
    is_kept = torch.rand_like(probabilities) >= dropout
    growth = 1 / (1 - dropout) if dropout < 1 else 0.0
    return torch.where(is_kept, probabilities * growth, 0.0).to(v.dtype) @ v


def feed_forward(dim: int, hidden_dim: int) -> nn.Sequential:
    """The FFN: (..., C) -> (..., C), two linear layers with a ReLU between them, no dropout."""
    ffn = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
    for linear in (ffn[0], ffn[2]):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return ffn
