"""Focal loss and focal matching cost on sigmoid logits."""

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

ALPHA = 0.25
GAMMA = 2.0
# Inside the logarithms of the matching cost (original `FocalLossCost`); the loss needs none.
COST_EPS = 1e-12


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """Binary focal loss, elementwise and not reduced.

    -alpha (1 - p)^gamma log p where the target is 1, -(1 - alpha) p^gamma log(1 - p) where it is 0.

    Args:
        logits: any shape.
        targets: same shape, bool or 0 / 1.

    Returns:
        same shape and dtype as ``logits``.

    *Source*: mmdet `py_sigmoid_focal_loss`, which torchvision's equals up to rounding.
    """
    return sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=alpha, gamma=gamma)


def focal_cost(logits: Tensor, *, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """Cost of calling a query an object of class c: focal loss as a positive minus focal loss as a negative.

    Args:
        logits: (..., number of classes).

    Returns:
        same shape; select the column of the target's class.

    *Source*: mmdet `FocalLossCost` (eps 1e-12).
    """
    scores = logits.sigmoid()
    negative = -(1 - scores + COST_EPS).log() * (1 - alpha) * scores.pow(gamma)
    positive = -(scores + COST_EPS).log() * alpha * (1 - scores).pow(gamma)
    return positive - negative


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (...) int64 -> (..., num_classes) bool; a label of ``num_classes`` (background) gives a row of False."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)
