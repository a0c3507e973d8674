"""The transformer decoder: post-norm layers of self-attention, cross-attention and a feed-forward network.

Shape letters: B batch, L layers, Q queries, K tokens, C channels, M heads, D = C / M.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# softmax(q k^T / sqrt(D)) v with q (B, M, Q, D) and k, v (B, M, K, D) -> (B, M, Q, D), heads first.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        """Project, attend, project back.

        Args:
            query: (B, Q, C).
            key, value: (B, K, C).
            attend: the attention itself, called with heads first.

        Returns:
            (B, Q, C).
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            split_heads(F.linear(x, weight, bias), self.num_heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(merge_heads(attend(q, k, v)))


class DecoderLayer(nn.Module):
    """Self-attention, norm, cross-attention, norm, FFN, norm.

    *Quirk Q15*: attention dropout acts in self-attention only; dropout on the residual branch acts in both.

    Args:
        dim: C.
        num_heads: M.
        ffn_dim: hidden width of the FFN, which has no dropout.
        dropout: probability of both kinds of dropout.
    """

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_dropout = dropout
        self.self_attention = Attention(dim=dim, num_heads=num_heads)
        self.cross_attention = Attention(dim=dim, num_heads=num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_dropout = nn.Dropout(dropout)
        self.cross_dropout = nn.Dropout(dropout)
        for linear in (self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        attend: Attend,
    ) -> Tensor:
        """One layer, x (B, Q, C) -> (B, Q, C); keys and values (B, K, C), the rest as in :meth:`Decoder.forward`."""
        dropout = self.attention_dropout if self.training else 0.0

        def attend_to_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)

        placed = x + query_positions
        x = self.norms[0](x + self.self_dropout(self.self_attention(placed, placed, x, attend_to_queries)))
        x = self.norms[1](x + self.cross_dropout(self.cross_attention(x + query_positions, keys, values, attend)))
        return self.norms[2](x + self.ffn(x))


class Decoder(nn.Module):
    """A stack of layers and one norm shared by their outputs.

    Args:
        dim: C.
        num_heads: M.
        ffn_dim: hidden width of the FFN.
        num_layers: L.
        dropout: see :class:`DecoderLayer`.
        checkpoint_layers: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        dropout: float = 0.1,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_layers = checkpoint_layers
        self.layers = nn.ModuleList(
            DecoderLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.post_norm = nn.LayerNorm(dim)

    def forward(
        self,
        query_positions: Tensor,
        tokens: Tensor,
        token_positions: Tensor,
        *,
        attention_mask: Tensor | None = None,
        attend: Attend = F.scaled_dot_product_attention,
    ) -> Tensor:
        """Decode queries that start at zero.

        Args:
            query_positions: (B, Q, C).
            tokens: (B, K, C), the values of the cross-attention.
            token_positions: (B, K, C), added to the tokens to make its keys.
            attention_mask: (Q, Q) or broadcastable to (B, M, Q, Q) bool, True = may attend; None: all may.
            attend: the cross-attention of all layers, called with q (B, M, Q, D) and k, v (B, M, K, D).

        Returns:
            (L, B, Q, C). *Quirk Q7*: the shared norm is applied to every layer's output, but the next layer is fed
            the output without it.

        *Source*: original `PETRTransformerDecoder`.
        """
        keys = tokens + token_positions
        x = torch.zeros_like(query_positions)
        outputs = []
        for layer in self.layers:
            arguments = (x, query_positions, keys, tokens, attention_mask, attend)
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
            outputs.append(self.post_norm(x))
        return torch.stack(outputs)
