"""Task heads: a small network per branch, with its own parameters for every decoder layer.

Shape letters: B batch, L decoder layers, Q queries, C channels, H = hidden channels of a branch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.geometry import inverse_sigmoid, to_metres
from cmt_aqr.precision import at_least_float32
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, Predictions, TaskClasses

LAYER_NORM_EPS = 1e-6


def layerwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution along the query axis with other weights for every decoder layer, zero-padded to the same length.

    The original's grouped Conv1d over (B, L * C, Q), as one batched matrix product: cuDNN is several times slower on
    so many small groups.

    Args:
        x: (L, B, Q, C).
        weight: (L * width, C, kernel), kernel odd.
        bias: (L * width,).

    Returns:
        (L, B, Q, width).
    """
    layers, batch, queries, _ = x.shape
    kernel = weight.shape[-1]
    if kernel > 1:
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        x = torch.cat([padded[:, :, tap : tap + queries] for tap in range(kernel)], dim=-1)
    matrix = weight.unflatten(0, (layers, -1)).permute(0, 3, 2, 1).flatten(1, 2)  # (L, kernel * C, width)
    y = torch.bmm(x.flatten(1, 2), matrix).unflatten(1, (batch, queries))
    return y if bias is None else y + bias.view(layers, 1, 1, -1)


class LayerwiseConv(nn.Module):
    """Parameters of :func:`layerwise_conv`, named, shaped and initialised like those of a grouped ``nn.Conv1d``.

    Args:
        num_layers: L.
        in_channels, width: channels per layer before and after.
        kernel: odd.
        has_bias: add a bias.
    """

    def __init__(self, *, num_layers: int, in_channels: int, width: int, kernel: int, has_bias: bool) -> None:
        super().__init__()
        bound = (in_channels * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(num_layers * width, in_channels, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_layers * width).uniform_(-bound, bound)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(L, B, Q, in_channels) -> (L, B, Q, width)."""
        return layerwise_conv(x, self.weight, self.bias)


class LayerwiseNorm(nn.Module):
    """Layer norm over the channels of a query, with a scale and shift for every decoder layer and channel.

    Args:
        num_layers: L.
        channels: H.

    *Source*: original `GroupLayerNorm1d` (eps 1e-6, biased variance).
    """

    def __init__(self, *, num_layers: int, channels: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(num_layers * channels))
        self.bias = nn.Parameter(torch.zeros(num_layers * channels))

    def forward(self, x: Tensor) -> Tensor:
        """(L, B, Q, H) -> the same shape."""
        normal = F.layer_norm(x, (self.channels,), eps=LAYER_NORM_EPS)
        shape = (self.num_layers, 1, 1, self.channels)
        return normal * self.weight.view(shape) + self.bias.view(shape)


class Branch(nn.Module):
    """One quantity: convolution, norm, ReLU, convolution, each with its own parameters for every decoder layer.

    Args:
        num_layers: L.
        dim: C.
        hidden: H.
        width: channels of the result.
        kernel: size of both convolutions along the query axis; 1 treats queries alone, 3 (LiDAR-only models) mixes
            neighbouring queries.
    """

    def __init__(self, *, num_layers: int, dim: int, hidden: int, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = LayerwiseConv(num_layers=num_layers, in_channels=dim, width=hidden, kernel=kernel, has_bias=False)
        self.norm = LayerwiseNorm(num_layers=num_layers, channels=hidden)
        self.out = LayerwiseConv(num_layers=num_layers, in_channels=hidden, width=width, kernel=kernel, has_bias=True)

    def forward(self, x: Tensor, is_valid: Tensor | None) -> Tensor:
        """Apply to all layers at once.

        Args:
            x: (L, B, Q, C).
            is_valid: (Q,) bool. Rows where it is False are zeroed before each convolution along the query axis; they
                stand at the front, so to the others they are the zero padding. None: all rows are valid.

        Returns:
            (L, B, Q, width).
        """
        is_padding = None if is_valid is None or self.kernel == 1 else ~is_valid[:, None]
        x = x if is_padding is None else x.masked_fill(is_padding, 0)
        x = torch.relu(self.norm(self.conv(x)))
        x = x if is_padding is None else x.masked_fill(is_padding, 0)
        return self.out(x)


class TaskHead(nn.Module):
    """All branches of one task.

    Args:
        num_layers, dim, hidden, kernel: see :class:`Branch`.
        num_classes: classes of the task.
        cls_prior: initial score of every class, set through the bias of the last layer; None keeps the default
            initialisation, as the original does (its `init_bias` of -2.19 is never applied).
    """

    def __init__(
        self, *, num_layers: int, dim: int, hidden: int, kernel: int, num_classes: int, cls_prior: float | None
    ) -> None:
        super().__init__()
        if cls_prior is not None and not 0 < cls_prior < 1:
            raise ValueError(f"cls_prior must lie between 0 and 1, got {cls_prior}")
        widths = {**BOX_BRANCHES, CLASS_BRANCH: num_classes}
        self.branches = nn.ModuleDict(
            {
                name: Branch(num_layers=num_layers, dim=dim, hidden=hidden, width=width, kernel=kernel)
                for name, width in widths.items()
            }
        )
        if cls_prior is not None:
            nn.init.constant_(self.branches[CLASS_BRANCH].out.bias, -math.log((1 - cls_prior) / cls_prior))

    def forward(self, x: Tensor, is_valid: Tensor | None) -> dict[str, Tensor]:
        """(L, B, Q, C) -> raw branches (L, B, Q, width)."""
        return {name: branch(x, is_valid) for name, branch in self.branches.items()}


def place_boxes(raw: dict[str, Tensor], reference_points: Tensor, point_range: Sequence[float]) -> dict[str, Tensor]:
    """Raw branches -> metres for the two branches that are relative to the reference point.

    center = sigmoid(raw + inverse_sigmoid(x, y)) over the x, y range; height = sigmoid(raw + inverse_sigmoid(z)) over
    the z range, although it learns log length (*Quirk Q1*).

    Args:
        raw: (L, B, Q, width) per branch.
        reference_points: (B, Q, 3) in [0, 1].
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.

    *Source*: original `CmtHead.forward_single`.
    """
    logits = inverse_sigmoid(reference_points)
    unit = (torch.cat((raw["center"], raw["height"]), dim=-1) + logits).sigmoid()
    metres = to_metres(unit, point_range)
    return {**raw, "center": metres[..., :2], "height": metres[..., 2:]}


class Heads(nn.Module):
    """The heads of all tasks.

    Args:
        classes: class indices of each task, see ``predictions.task_classes``.
        num_layers: L.
        dim: C.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        hidden: H.
        kernel: 1, or 3 for LiDAR-only models, see :class:`Branch`.
        cls_prior: see :class:`TaskHead`.
    """

    def __init__(
        self,
        *,
        classes: TaskClasses,
        num_layers: int,
        dim: int,
        point_range: Sequence[float],
        hidden: int = 64,
        kernel: int = 1,
        cls_prior: float | None = None,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel of the heads must be odd, got {kernel}")
        self.classes = tuple(tuple(task) for task in classes)
        self.point_range = tuple(point_range)
        self.tasks = nn.ModuleList(
            TaskHead(
                num_layers=num_layers,
                dim=dim,
                hidden=hidden,
                kernel=kernel,
                num_classes=len(task),
                cls_prior=cls_prior,
            )
            for task in self.classes
        )

    def forward(
        self, hidden: Tensor, reference_points: Tensor, *, num_dn: int = 0, is_valid: Tensor | None = None
    ) -> Predictions:
        """Predict from every layer's output, in at least float32, also under autocast.

        bfloat16 would move box centres by 2 cm on average.

        Args:
            hidden: (L, B, Q, C) decoder output.
            reference_points: (B, Q, 3) in [0, 1].
            num_dn: denoising rows at the front of Q.
            is_valid: (Q,) bool, False for padding rows; None: all rows are valid.
        """
        hidden, points = at_least_float32(hidden), at_least_float32(reference_points)
        with torch.autocast(hidden.device.type, enabled=False):
            tasks = tuple(place_boxes(task(hidden, is_valid), points, self.point_range) for task in self.tasks)
        return Predictions(tasks, self.classes, num_dn)
