"""A detector computed as the original programs compute it, with the same weights: the baseline of the benches."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmt_aqr.aqr.router import BiasRouter, Routed
from cmt_aqr.attention import AttentionBias, QueryWindows
from cmt_aqr.attention.dense import dense_bias
from cmt_aqr.cameras import Cameras
from cmt_aqr.models import spconv_backend
from cmt_aqr.models.detector import Detector
from cmt_aqr.tokens import Queries, Tokens
from cmt_aqr.transformer_layers import Attend


def in_original_manner(detector: Detector, *, with_aqr: bool) -> Detector:
    """A copy whose sparse encoder is spconv's and whose bias is a dense float mask; in eager mode.

    Args:
        with_aqr: False: the plain CMT with its unbiased (flash) attention.
    """
    original = copy.deepcopy(detector)
    branch = original.lidar_branch
    if branch is not None and spconv_backend.import_error() is None:
        branch.encoder.backend = "spconv"
    if not with_aqr:
        original.aqr = None
    elif isinstance(original.aqr, BiasRouter):
        original.aqr = MaskedRouter(original.aqr)
    return original


class MaskedRouter(nn.Module):
    """AQR's bias as a float mask (B * M, Q, K) that every layer builds and adds to the scores of all its heads.

    *Source*: what ``nn.MultiheadAttention`` computes for an `attn_mask` with ``need_weights``, without the mean of the
    attention weights over the heads, which the decoder does not read.
    """

    def __init__(self, router: BiasRouter) -> None:
        super().__init__()
        self.router = router
        router.backend = "dense"

    def find_windows(self, queries: Queries, layout, cameras: Cameras | None) -> QueryWindows:
        """Windows of all queries."""
        return self.router.find_windows(queries, layout, cameras)

    def forward(
        self, queries: Queries, tokens: Tokens, cameras: Cameras | None, windows: QueryWindows | None = None
    ) -> Routed:
        """The router's own weights and bias, with the attention of the original."""
        routed = self.router(queries, tokens, cameras, windows)
        return replace(routed, attend=masked_attention(routed.bias))

    def token_length(self, layout, device: torch.device) -> int:
        """Length of the token axis: no padding."""
        return layout.num_tokens

    def clamp_parameters(self) -> None:
        """As the router."""
        self.router.clamp_parameters()

    def metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """As the router."""
        return self.router.metrics(weights)


def masked_attention(bias: AttentionBias) -> Attend:
    """softmax(q k^T / sqrt(D) + mask) v with all in memory: scores, mask and attention weights, each M x Q x K."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch_size, heads = q.shape[:2]
        mask = dense_bias(bias).to(q.dtype).repeat_interleave(heads, dim=0)
        q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        shares = torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(dim=-1)
        return torch.bmm(shares.to(v.dtype), v).unflatten(0, (batch_size, heads))

    return attend
