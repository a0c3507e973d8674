"""Predictions -> boxes: the best scores over queries and classes, then a range filter; no non-maximum suppression.

Shape letters: B batch, Q matching queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cmt_aqr.boxes import Detections, decode_boxes
from cmt_aqr.geometry import constant_like
from cmt_aqr.predictions import Predictions


def inside(centres: Tensor, post_range: Sequence[float]) -> Tensor:
    """(..., 3) metres -> (...) bool: x_min, y_min, z_min <= centre <= x_max, y_max, z_max, borders included."""
    low, high = constant_like(post_range, centres).chunk(2)
    return ((centres >= low) & (centres <= high)).all(-1)


def postprocess(
    predictions: Predictions,
    *,
    post_range: Sequence[float],
    max_detections: int = 300,
    score_threshold: float | None = None,
) -> list[Detections]:
    """Decode the last layer.

    Args:
        predictions: of the detector; denoising rows are skipped.
        post_range: x_min, y_min, z_min, x_max, y_max, z_max in metres; detections with their gravity centre outside
            are dropped after the selection, so fewer than ``max_detections`` may remain.
        max_detections: scores kept over all queries and classes (*Quirk Q10*: 300, the 200 of the original's test
            config is never read). Where there are fewer scores, all are kept.
        score_threshold: keep scores above it; None or 0 keeps all.

    Returns:
        one record per sample, best first, boxes with the gravity centre's z. A query can appear with several classes;
        its box comes from the task that owns the class.

    *Source*: original `MultiTaskBBoxCoder.decode`; the shift to the bottom centre that follows there is left out.
    """
    queries = slice(predictions.num_dn, None)
    scores = torch.cat([task["cls_logits"][-1, :, queries].sigmoid() for task in predictions.tasks], dim=-1)
    codes = torch.stack([predictions.codes(task)[-1, :, queries] for task in range(len(predictions.tasks))], dim=1)
    classes = [label for members in predictions.classes for label in members]
    owners = [task for task, members in enumerate(predictions.classes) for _ in members]
    class_of = torch.tensor(classes, device=scores.device)
    task_of = torch.tensor(owners, device=scores.device)

    count = min(max_detections, scores[0].numel())
    best, index = scores.flatten(1).topk(count)
    query, column = index // len(classes), index % len(classes)
    sample = torch.arange(len(scores), device=scores.device)[:, None]
    boxes = decode_boxes(codes[sample, task_of[column], query])
    keep = inside(boxes[..., :3], post_range)
    if score_threshold:
        keep &= best > score_threshold
    labels = class_of[column]
    return [Detections(boxes[b, k], best[b, k], labels[b, k]) for b, k in enumerate(keep)]
