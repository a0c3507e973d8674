"""The transformer decoder: post-norm layers of self-attention, cross-attention and a feed-forward network.

Shape letters: B batch, L layers, Q queries, K tokens, C channels, M heads, D = C / M.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmt_aqr.transformer_layers import (
    KEY,
    VALUE,
    Attend,
    Attention,
    attention_with_dropout,
    feed_forward,
    project_for_all,
)


class DecoderLayer(nn.Module):
    """Self-attention, norm, cross-attention, norm, FFN, norm.

    *Quirk Q15*: attention dropout acts in self-attention only; dropout on the residual branch acts in both.

    Args:
        dim: C.
        num_heads: M.
        ffn_dim: hidden width of the FFN, which has no dropout.
        dropout: probability of both kinds of dropout.
        is_recomputed: whether the backward pass runs the layer again, see :func:`attention_with_dropout`.
    """

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float, is_recomputed: bool = False) -> None:
        super().__init__()
        self.attention_dropout = dropout
        self.is_recomputed = is_recomputed
        self.self_attention = Attention(dim=dim, num_heads=num_heads)
        self.cross_attention = Attention(dim=dim, num_heads=num_heads)
        self.ffn = feed_forward(dim, ffn_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_dropout = nn.Dropout(dropout)
        self.cross_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        attend: Attend,
    ) -> Tensor:
        """One layer, x (B, Q, C) -> (B, Q, C).

        Args:
            k, v: (B, M, K, D) projected by ``cross_attention``; the rest as in :meth:`Decoder.forward`.
        """
        x = self.attend_to_queries(x, query_positions, attention_mask)
        x = self.attend_to_tokens(x, query_positions, k, v, attend)
        return self.transform(x)

    def attend_to_queries(self, x: Tensor, query_positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Self-attention and norm."""
        dropout = self.attention_dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if dropout and self.is_recomputed and torch.compiler.is_compiling():
                return attention_with_dropout(q, k, v, attention_mask=attention_mask, dropout=dropout)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)

        placed = x + query_positions
        return self.norms[0](x + self.self_dropout(self.self_attention(placed, placed, x, attend)))

    def attend_to_tokens(self, x: Tensor, query_positions: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Cross-attention and norm."""
        return self.norms[1](x + self.cross_dropout(self.cross_attention.attend_to(x + query_positions, k, v, attend)))

    def transform(self, x: Tensor) -> Tensor:
        """The feed-forward network and norm."""
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
            DecoderLayer(
                dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout, is_recomputed=checkpoint_layers
            )
            for _ in range(num_layers)
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
        # One product for all layers, unless a backward pass would have to hold the gradients of all layers at once.
        is_projected = not torch.is_grad_enabled()
        if is_projected:
            attentions = [layer.cross_attention for layer in self.layers]
            all_k, all_v = project_for_all(attentions, KEY, keys), project_for_all(attentions, VALUE, tokens)
        for i, layer in enumerate(self.layers):
            arguments = (layer, x, query_positions, keys, tokens, attention_mask, attend)
            if is_projected:
                x = layer(x, query_positions, all_k[i], all_v[i], attention_mask, attend)
            elif self.checkpoint_layers:
                x = checkpoint(_project_and_decode, *arguments, use_reentrant=False)
            else:
                x = _project_and_decode(*arguments)
            outputs.append(self.post_norm(x))
        return torch.stack(outputs)


def _project_and_decode(
    layer: DecoderLayer,
    x: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    attend: Attend,
) -> Tensor:
    k, v = layer.cross_attention.project(KEY, keys), layer.cross_attention.project(VALUE, values)
    return layer(x, query_positions, k, v, attention_mask, attend)
