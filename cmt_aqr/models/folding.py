"""Batch norm folded into the convolution before it: the same numbers up to rounding, one pass less over the map.

    norm(conv(x)) = s (W x + c - mean) + beta = (s W) x + (beta + s (c - mean)),   s = gamma / sqrt(var + eps)

For inference alone: in training mode the statistics are those of the batch.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmt_aqr.models.sparse import SparseConvolution

# Names of a convolution and of the norm after it, in modules that are not an nn.Sequential.
PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("conv", "norm"))
# Dimension of a weight along which the output channels lie.
OUTPUT_DIM = {nn.Conv2d: 0, nn.ConvTranspose2d: 1, SparseConvolution: 0}


class RowShift(nn.Module):
    """What is left of a batch norm after a sparse convolution, which has no bias of its own."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, is_active: Tensor | None = None) -> Tensor:
        """X (S, C) -> (S, C) in the dtype of x, whichever rows are active."""
        return (x + self.bias).to(x.dtype)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of a model for inference: eval mode, no gradients, batch norms folded, computed in float64.

    Folded are the norms that follow a convolution in an nn.Sequential or under one of the names of ``PAIRS``; others
    stay as they are. Weights keep their dtype, the state_dict of the copy has other names.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for first, second in _neighbours(module):
            convolution, norm = getattr(module, first, None), getattr(module, second, None)
            if type(convolution) in OUTPUT_DIM and isinstance(norm, _BatchNorm):
                setattr(module, second, _fold(convolution, norm))
    return folded


def _neighbours(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, nn.Sequential):
        return pairwise(name for name, _ in module.named_children())
    return iter(PAIRS)


def _fold(convolution: nn.Module, norm: _BatchNorm) -> nn.Module:
    """Scale the weight of a convolution and give it its new bias; returns what replaces the norm."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    bias = getattr(convolution, "bias", None)
    shift = norm.bias.double() + scale * ((0 if bias is None else bias.double()) - norm.running_mean.double())
    weight = convolution.weight
    shape = [1] * weight.ndim
    shape[OUTPUT_DIM[type(convolution)]] = -1
    with torch.no_grad():
        weight.copy_(weight.double() * scale.view(shape))
    shift = shift.to(weight.dtype)
    if isinstance(convolution, SparseConvolution):
        return RowShift(shift)
    convolution.bias = nn.Parameter(shift, requires_grad=False)
    return nn.Identity()
