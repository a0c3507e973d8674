"""A comparison: the bias as a product of two thin matrices that are appended to queries and keys.

    bias ~ left right^T,   left (Q, R), right (K, R), from the R largest singular values
    [q, sqrt(D) left] [k, right]^T / sqrt(D) = q k^T / sqrt(D) + left right^T

so that attention without a bias, over D + R channels, computes attention with one (the idea of FlashBias). It is exact
at the rank of the bias only, and that is high: every query adds its own square of cells. For comparisons, not for
training: no gradient reaches the values of the bias.

Shape letters: B batch, M heads, Q queries, K tokens, D channels of a head, R rank.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_aqr.attention import AttendWithLse, AttentionBias
from cmt_aqr.attention.dense import QUERY_CHUNK, dense_bias
from cmt_aqr.attention.evaluate import check_shapes

# Of the squared singular values, the share that is kept.
ENERGY = 0.9
# Fused kernels want a multiple of it as the number of channels.
CHANNEL_MULTIPLE = 8


@dataclass(frozen=True)
class LowRankFactors:
    """A bias as ``left @ right^T``, and the error of that.

    Attributes:
        left: (B, Q, R), right: (B, K, R), float32 or float64, without gradient.
        max_error: largest |bias - left right^T|.
        relative_error: Frobenius norm of bias - left right^T over that of the bias, of the whole batch; 0 for a bias
            of zeros.
    """

    left: Tensor
    right: Tensor
    max_error: float
    relative_error: float

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[-1]


def make_lowrank_attend(
    bias: AttentionBias, *, energy: float = ENERGY, token_mask: Tensor | None = None
) -> AttendWithLse:
    """The backend ``lowrank``: as ``attention.make_attend``, with the factors of the bias; see :func:`factorise`."""
    factors = factorise(bias, energy)
    num_tokens = bias.windows.layout.num_tokens

    def evaluate(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        check_shapes(q, k, v, bias, token_mask)
        return factored_attention(q, k[:, :, :num_tokens], v[:, :, :num_tokens], factors, token_mask=token_mask)

    return evaluate


def factorise(bias: AttentionBias, energy: float = ENERGY) -> LowRankFactors:
    """Factors of a bias, for all layers that share it; warns with their rank and error.

    Needs the whole bias (B, Q, K) and its singular value decomposition in memory.

    Args:
        bias: what is factorised.
        energy: in (0, 1]; the rank is the smallest whose squared singular values reach this share in every sample.

    Raises:
        ValueError: an energy outside its range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    matrix = dense_bias(bias).detach()
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rank_of_energy(singular, energy, longest_side=max(matrix.shape[1:]))
    # Each factor takes the square root: in low precision neither is then much larger than the other.
    root = singular[..., None, :rank].sqrt()
    left, right = u[..., :rank] * root, vh[..., :rank, :].mT * root
    residual = matrix - left @ right.mT
    norm = matrix.norm().item()
    factors = LowRankFactors(
        left=left,
        right=right,
        max_error=residual.abs().max().item(),
        relative_error=residual.norm().item() / norm if norm else 0.0,
    )
    warnings.warn(
        f"low-rank attention bias: {100 * energy:g} % of its energy needs rank {rank} of {singular.shape[-1]}; "
        f"largest error {factors.max_error:.3g}, relative Frobenius error {factors.relative_error:.3g}",
        stacklevel=2,
    )
    return factors


def rank_of_energy(singular: Tensor, energy: float, *, longest_side: int) -> int:
    """The smallest rank that keeps a share of the energy in every sample.

    Args:
        singular: (B, S) singular values, descending.
        energy: share of the sum of their squares.
        longest_side: the larger dimension of the matrix; it decides which singular values are rounding errors.
    """
    noise = singular[:, :1] * longest_side * torch.finfo(singular.dtype).eps
    squares = torch.where(singular > noise, singular, 0).double().square()
    # What is lost at rank 0, 1, ...: summed from the small end, so that a loss of exactly 0 comes out as 0.
    lost = F.pad(squares.flip(-1).cumsum(-1).flip(-1), (0, 1))
    is_enough = lost <= (1 - energy) * lost[:, :1]
    return int(is_enough.to(torch.int8).argmax(-1).max())


def factored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: LowRankFactors,
    *,
    token_mask: Tensor | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + left right^T) v by attention without a bias.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, K, D).
        factors: of the bias.
        token_mask: (B, K) bool, True = may be attended to; None: all.
        query_chunk: queries whose scores (B, M, chunk, K) exist at a time for the lse, which the fused kernels do
            not return; they need none.

    Returns:
        out (B, M, Q, D) in the dtype of v, lse (B, M, Q), at least float32; 0 and -inf for a query without any token.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    # The fourth root to each factor, as above.
    balance = scale**-0.5
    q, k = _append(q, factors.left * balance), _append(k, factors.right * balance)
    mask = None if token_mask is None else token_mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    lses = []
    for queries in q.split(query_chunk, dim=2):
        scores = queries @ k.mT * scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        lses.append(scores.logsumexp(dim=-1))
    lse = torch.cat(lses, dim=2)
    # What the kernels give for a row without any token is not the same everywhere.
    return out.masked_fill(lse[..., None] == -math.inf, 0), lse


def _append(x: Tensor, factor: Tensor) -> Tensor:
    """(B, M, N, D), (B, N, R) -> (B, M, N, D + R and zeros up to a multiple of CHANNEL_MULTIPLE)."""
    factor = factor[:, None].expand(-1, x.shape[1], -1, -1).to(x.dtype)
    return F.pad(torch.cat((x, factor), dim=-1), (0, -(x.shape[-1] + factor.shape[-1]) % CHANNEL_MULTIPLE))
