"""Boxes: component order, box code, corners, and the two records that carry boxes between packages.

box (9): cx, cy, cz, length, width, height, yaw, vx, vy. LiDAR frame, metres, radians, m/s; (cx, cy, cz) is the gravity
centre; yaw is counter-clockwise about +z and 0 when the heading is +x; length lies along the heading (Quirk Q2).

box code (10), what the network regresses: cx, cy, log length, log width, cz, log height, sin yaw, cos yaw, vx, vy
(Quirk Q1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.box_format import BOX_SIZE
from cmt_aqr.classes import CLASSES

# Signs of the eight corners in halves of the size: bottom face counter-clockwise from rear right, then the top face.
_CORNER_SIGNS = (
    (-1, -1, -1), (1, -1, -1), (1, 1, -1), (-1, 1, -1),
    (-1, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Targets:
    """Ground truth of one frame.

    Attributes:
        boxes: (G, 9) float32, LiDAR frame; velocities may be NaN where the annotation has none.
        labels: (G,) int64 in [0, 9], index into ``classes.CLASSES``.
    """

    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same record on another device."""
        boxes = self.boxes.to(device, non_blocking=non_blocking)
        return Targets(boxes, self.labels.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Detections:
    """Decoded boxes of one frame, best first.

    Attributes:
        boxes: (N, 9), LiDAR frame.
        scores: (N,) in [0, 1], descending.
        labels: (N,) int64 in [0, 9].
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def cpu(self) -> "Detections":
        """The same record on the CPU."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu())


def pad_targets(targets: Sequence[Targets], count: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first ``count`` boxes of every frame in one tensor.

    Returns:
        boxes (B, count, 9), unit boxes at the origin where a frame has fewer; labels (B, count) int64,
        ``len(CLASSES)`` (background) there.

    Raises:
        ValueError: the boxes of a frame do not fit its labels.
    """
    device = targets[0].boxes.device
    boxes = torch.zeros(len(targets), count, BOX_SIZE, dtype=dtype, device=device)
    boxes[..., 3:6] = 1
    labels = torch.full((len(targets), count), len(CLASSES), dtype=torch.int64, device=device)
    for sample, target in enumerate(targets):
        if target.boxes.shape != (len(target.labels), BOX_SIZE):
            raise ValueError(
                f"targets of sample {sample}: boxes must have shape ({len(target.labels)}, {BOX_SIZE}) to go with "
                f"{len(target.labels)} labels, got {tuple(target.boxes.shape)}"
            )
        kept = min(len(target.boxes), count)
        boxes[sample, :kept] = target.boxes[:kept].to(dtype)
        labels[sample, :kept] = target.labels[:kept]
    return boxes, labels


def encode_boxes(boxes: Tensor) -> Tensor:
    """Boxes (..., 9) -> box codes (..., 10), same dtype. Sizes must be positive. *Quirk Q1, Q2*."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack((x, y, length.log(), width.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy), dim=-1)


def decode_boxes(codes: Tensor) -> Tensor:
    """Box codes (..., 10) -> boxes (..., 9), same dtype; the inverse of :func:`encode_boxes` up to 2 pi in yaw."""
    x, y, log_l, log_w, z, log_h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack((x, y, z, log_l.exp(), log_w.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy), dim=-1)


def box_corners(boxes: Tensor) -> Tensor:
    """Corners of boxes.

    Args:
        boxes: (..., 9).

    Returns:
        (..., 8, 3) metres, LiDAR frame: bottom face (0..3) counter-clockwise from rear right, then the top face (4..7)
        in the same order; corners 1, 2, 5, 6 are the front.
    """
    signs = boxes.new_tensor(_CORNER_SIGNS)
    local = signs * boxes[..., None, 3:6] / 2
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack((x, y, local[..., 2]), dim=-1) + boxes[..., None, :3]


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points lie inside which boxes.

    Args:
        points: (P, >=3), LiDAR frame; only x, y, z are read.
        boxes: (G, 9).

    Returns:
        (P, G) bool, borders included.
    """
    offset = points[:, None, :3] - boxes[None, :, :3]
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = -offset[..., 0] * sin + offset[..., 1] * cos
    half = boxes[:, 3:6] / 2
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1]) & (offset[..., 2].abs() <= half[:, 2])
