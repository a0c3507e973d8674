"""Tokens and queries: the two sides of the cross-attention, as AQR, the decoder and the heads read them.

Shape letters: B batch, K tokens, Q queries (denoising rows first), C channels.
"""

from dataclasses import dataclass

from torch import Tensor

from cmt_aqr.attention import QueryWindows, TokenLayout


@dataclass(frozen=True)
class Tokens:
    """Keys and values of the cross-attention.

    Attributes:
        values: (B, K, C); after the tokens of the layout there may be zeros up to ``layout.padded_length``, for an
            attention that ignores them.
        positions: (B, K, C) position embeddings, at least float32; keys are values + positions.
        layout: which token is where: BEV tokens first, then cameras.
    """

    values: Tensor
    positions: Tensor
    layout: TokenLayout


@dataclass(frozen=True)
class Queries:
    """What the decoder and the heads need to know about the queries.

    Attributes:
        reference_points: (B, Q, 3) in [0, 1] of the point range, at least float32.
        positions: (B, Q, C) position embeddings, at least float32.
        num_dn: number of denoising rows at the front of Q.
        attention_mask: (Q, Q) bool, True = may attend, or None when every query sees every other.
        is_valid: (Q,) bool, False for the padding rows, or None when there are none.
    """

    reference_points: Tensor
    positions: Tensor
    num_dn: int = 0
    attention_mask: Tensor | None = None
    is_valid: Tensor | None = None


@dataclass(frozen=True)
class Geometry:
    """What depends on calibration, grids and weights alone, and is computed once for many frames.

    Attributes:
        token_positions: (B, K, C), as in :class:`Tokens`, padding included.
        queries: the matching queries.
        windows: of the queries; None without AQR.
    """

    token_positions: Tensor
    queries: Queries
    windows: QueryWindows | None
