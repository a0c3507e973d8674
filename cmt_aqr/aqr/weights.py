"""The weight generator: a weight per query and sensor, computed from the tokens in the query's windows.

    x = 0
    per layer:  x = norm(x + attention(x + query position; window tokens))
                x = norm(x + FFN(x))
    weights = activation(linear(x))        one for every grid of tokens

A query sees the tokens of its windows and nothing else, so attention is a gather of some
tens of tokens a query, never a [Q x K] product.

Shape letters: B batch, Q queries, K tokens, T tokens in the windows of a query, G grids, C channels, M heads,
D = C / M.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.aqr.window_tokens import all_window_tokens
from cmt_aqr.attention import QueryWindows
from cmt_aqr.transformer_layers import Attend, Attention, feed_forward

Activation = Literal["tanh", "sigmoid"]
# Standard deviation, before the activation, of the weights of a fresh generator over random queries.
INIT_STD = 0.02
# How far inside [0, 1] a fresh generator with sigmoid begins: at the ends themselves its gradient is 0.
INIT_MARGIN = 0.05


def gather_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of x (B, M, K, D) at tokens (B, Q, T) -> (B, M, Q, T, D)."""
    batch_size, num_heads, num_tokens, _ = x.shape
    first = num_tokens * torch.arange(batch_size * num_heads, device=x.device).view(batch_size, num_heads, 1, 1)
    # An embedding, because its backward pass on a GPU adds up repeated rows in float32 and in a fixed order, unlike
    # those of gather and index_select.
    return F.embedding(first + tokens[:, None], x.reshape(-1, x.shape[-1]))


def window_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, is_valid: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where every query attends to tokens of its own only.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, K, D).
        tokens: (B, Q, T) int64, which tokens a query sees.
        is_valid: (B, Q, T) bool, False: the entry is to be ignored; its index is any one in range.

    Returns:
        (B, M, Q, D) in the dtype of v; 0 for a query without a valid token. The softmax is taken in at least float32.
    """
    scores = q[..., None, :] @ gather_tokens(k, tokens).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (B, M, Q, 1, T)
    is_valid = is_valid[:, None, :, None]
    # The lowest number instead of -inf: a row without any valid token stays finite, and the product makes it 0.
    shares = scores.masked_fill(~is_valid, torch.finfo(scores.dtype).min).softmax(dim=-1) * is_valid
    return (shares.to(v.dtype) @ gather_tokens(v, tokens)).squeeze(-2)


class GeneratorLayer(nn.Module):
    """Attention to the window tokens, norm, FFN, norm; no dropout, so a query's weights depend on its tokens alone.

    Args:
        dim: C.
        num_heads: M.
        ffn_dim: hidden width of the FFN.
    """

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim=dim, num_heads=num_heads)
        self.ffn = feed_forward(dim, ffn_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, attend: Attend) -> Tensor:
        """x (B, Q, C) -> (B, Q, C); keys and values (B, K, C); ``attend``: :func:`window_attention` to these windows.

        Tokens are projected before they are gathered: there are fewer of them than of window entries.
        """
        x = self.norms[0](x + self.attention(x + query_positions, keys, values, attend))
        return self.norms[1](x + self.ffn(x))


class WeightGenerator(nn.Module):
    """Queries and the tokens in their windows -> per-query weights of the sensors.

    A fresh generator gives nearly the same weights to every query, those without effect, so that training starts
    from the detector as it is. The last layer's weights are drawn with a standard deviation of ``INIT_STD`` /
    sqrt(C): small, but not 0, because then no gradient would reach what comes before. Its bias is 0 for tanh; for
    sigmoid, whose gradient is 0 at 0 and 1, it begins ``INIT_MARGIN`` away from ``neutral``.

    Args:
        dim: C.
        num_heads: M.
        ffn_dim: hidden width of the FFNs.
        num_layers: number of layers.
        num_grids: G.
        activation: ``tanh``: weights in [-1, 1]; ``sigmoid``: in [0, 1].
        neutral: the weight that has no effect: 0 for a bias, 1 for a factor.

    Raises:
        ValueError: another activation; tanh with a neutral weight other than 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        num_grids: int,
        activation: Activation,
        neutral: float,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"the activation of the weights must be tanh or sigmoid, got {activation!r}")
        if activation == "tanh" and neutral != 0:
            raise ValueError(f"weights by tanh are for a neutral weight of 0, got {neutral}")
        self.activation = activation
        self.layers = nn.ModuleList(
            GeneratorLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim) for _ in range(num_layers)
        )
        self.linear = nn.Linear(dim, num_grids)
        nn.init.normal_(self.linear.weight, std=INIT_STD / math.sqrt(dim))
        start = 0.0
        if activation == "sigmoid":
            share = min(max(neutral, INIT_MARGIN), 1 - INIT_MARGIN)
            start = math.log(share / (1 - share))
        nn.init.constant_(self.linear.bias, start)

    def forward(
        self, query_positions: Tensor, tokens: Tensor, token_positions: Tensor, windows: QueryWindows
    ) -> Tensor:
        """Weights of all queries.

        Args:
            query_positions: (B, Q, C) position embeddings; the content of a query starts at 0, as in the decoder.
            tokens: (B, K, C), values.
            token_positions: (B, K, C) or broadcastable; keys are tokens + positions.
            windows: of these queries. The generator looks through them also where the bias itself is not local.

        Returns:
            (B, Q, G), at least float32.
        """
        indices, is_valid = all_window_tokens(windows)

        def attend_to_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, indices, is_valid)

        keys = tokens + token_positions
        x = torch.zeros_like(query_positions)
        for layer in self.layers:
            x = layer(x, query_positions, keys, tokens, attend_to_windows)
        logits = self.linear(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.tanh() if self.activation == "tanh" else logits.sigmoid()
