"""Denoising queries: noised ground-truth boxes as extra queries, a constant number of them, and the attention mask.

Shape letters: B batch, G boxes of a frame, Q = num_dn + num_queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.boxes import Targets, pad_targets
from cmt_aqr.classes import CLASSES
from cmt_aqr.geometry import to_unit
from cmt_aqr.predictions import DenoisingQueries

BACKGROUND = len(CLASSES)


@dataclass(frozen=True)
class DenoisingSettings:
    """How ground truth becomes denoising queries.

    Attributes:
        max_groups: upper limit of groups (see :func:`group_sizes`).
        noise_scale: factor on the shift of the centres.
        positive_threshold: a row whose noise vector is longer than this becomes background.
    """

    max_groups: int = 10
    noise_scale: float = 1.0
    positive_threshold: float = 0.75


_OFFICIAL = DenoisingSettings()


def group_sizes(max_boxes: int, *, num_queries: int, num_dn: int, max_groups: int) -> tuple[int, int]:
    """How many groups, and how many slots in each.

    groups = min(max_groups, num_queries // max_boxes) as in the original, and no more than fit into ``num_dn`` rows.
    When not even one group of ``max_boxes`` fits, there is one group of ``num_dn`` slots, which takes the first
    boxes of every frame. More boxes than queries give no group at all, as in the original; no boxes give none either
    (the original divides by zero).

    Returns:
        (groups, slots), groups * slots <= num_dn.
    """
    slots = min(max_boxes, num_dn)
    if slots == 0:
        return 0, 0
    return min(max_groups, num_queries // max_boxes, num_dn // slots), slots


def noised_centres(boxes: Tensor, noise: Tensor, *, noise_scale: float) -> Tensor:
    """Shift box centres by a random part of the half size.

    Args:
        boxes: (..., 9), LiDAR frame.
        noise: (..., 3) in [-1, 1].
        noise_scale: factor on the shift.

    Returns:
        (..., 3) metres.

    *Source*: original `CmtHead.prepare_for_dn`, whose constant part of the shift is 0 in every configuration.
    """
    return boxes[..., :3] + noise * (boxes[..., 3:6] / 2) * noise_scale


def denoising_mask(
    groups: int, slots: int, *, num_dn: int, num_queries: int, device: torch.device | None = None
) -> Tensor:
    """Self-attention mask (Q, Q) bool, True = row may attend to column.

    A group sees itself, empty slots included (*Quirk Q8*), and all matching queries; matching queries see only each
    other; a padding row sees only itself, which keeps its softmax finite, and no other row sees it.
    """
    first = num_dn - groups * slots
    index = torch.arange(num_dn + num_queries, device=device)
    is_matching = index >= num_dn
    is_padding = index < first
    group = (index - first).div(max(slots, 1), rounding_mode="floor").masked_fill(is_matching, groups)
    same_group = (group[:, None] == group[None, :]) & ~is_padding[:, None] & ~is_padding[None, :]
    sees_matching = ~is_padding[:, None] & is_matching[None, :]
    return same_group | sees_matching | (index[:, None] == index[None, :])


def make_denoising(
    targets: Sequence[Targets],
    *,
    num_queries: int,
    num_dn: int,
    point_range: Sequence[float],
    settings: DenoisingSettings = _OFFICIAL,
    max_boxes: int | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DenoisingQueries:
    """Denoising queries of a batch, always ``num_dn`` rows.

    Args:
        targets: one record per sample, all on one device.
        num_queries: number of matching queries.
        num_dn: number of rows; ``num_queries`` rows always hold what the original would make.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        max_boxes: boxes of the fullest frame; with several processes, the maximum over all of them, so that all make
            the same number of groups. None takes the maximum of ``targets``.
        noise: (B, num_dn, 3) uniform in [0, 1), one vector a row; None draws it from ``generator``.
        generator: source of the noise, on any device; None is the default generator of the targets' device.

    Returns:
        See :class:`DenoisingQueries`; reference points are clamped to the unit cube.

    *Source*: original `CmtHead.prepare_for_dn`, where a ``noise_scale`` of 0 leaves centres in metres. *Quirk Q8*.
    """
    if num_dn < 0:
        raise ValueError(f"num_dn must not be negative, got {num_dn}")
    fullest = max((len(target.boxes) for target in targets), default=0)
    max_boxes = fullest if max_boxes is None else max_boxes
    if max_boxes < fullest:
        raise ValueError(f"max_boxes is {max_boxes}, but a frame of the batch has {fullest} boxes")
    boxes, labels = pad_targets(targets, min(max_boxes, num_dn), dtype=targets[0].boxes.dtype)
    groups, slots = group_sizes(max_boxes, num_queries=num_queries, num_dn=num_dn, max_groups=settings.max_groups)
    num_padding = num_dn - groups * slots
    if noise is None:
        device = boxes.device if generator is None else generator.device
        noise = torch.rand((len(targets), num_dn, 3), generator=generator, dtype=boxes.dtype, device=device)
    if noise.shape != (len(targets), num_dn, 3):
        expected = (len(targets), num_dn, 3)
        raise ValueError(f"noise must have shape {expected} (samples, num_dn, 3), got {tuple(noise.shape)}")
    noise = 2 * noise.to(boxes) - 1

    boxes, clean_labels, is_known = (_to_rows(x, groups, num_padding) for x in (boxes, labels, labels != BACKGROUND))
    boxes[:, :num_padding, 3:6] = 1
    clean_labels = clean_labels.masked_fill(~is_known, BACKGROUND)
    centres = noised_centres(boxes, noise, noise_scale=settings.noise_scale)
    reference_points = to_unit(centres, point_range).clamp(0, 1).masked_fill(~is_known[..., None], 0)
    is_far = torch.linalg.vector_norm(noise, dim=-1) > settings.positive_threshold
    return DenoisingQueries(
        reference_points=reference_points,
        attention_mask=denoising_mask(groups, slots, num_dn=num_dn, num_queries=num_queries, device=boxes.device),
        is_valid=torch.arange(num_dn, device=boxes.device) >= num_padding,
        is_known=is_known,
        boxes=boxes,
        labels=clean_labels.masked_fill(is_far, BACKGROUND),
        clean_labels=clean_labels,
    )


def _to_rows(padded: Tensor, groups: int, num_padding: int) -> Tensor:
    """(B, slots, ...) -> (B, num_dn, ...): zeros for the padding rows, then the slots once per group."""
    rows = padded.new_zeros(padded.shape[0], num_padding, *padded.shape[2:])
    return torch.cat((rows, *[padded] * groups), dim=1)
