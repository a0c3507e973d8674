"""Predictions -> boxes: the best scores over queries and classes, then a range filter; no non-maximum suppression.

Shape letters: B batch, Q matching queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_aqr.boxes import Detections, decode_boxes
from cmt_aqr.geometry import constant_like
from cmt_aqr.predictions import Predictions, TaskClasses


@dataclass(frozen=True)
class Decoding:
    """How raw predictions become detections; see :func:`postprocess`."""

    max_detections: int
    post_range: tuple[float, ...]
    score_threshold: float | None


class ClassTables(NamedTuple):
    """What a column of the class scores of all tasks means: its class, and the task that owns it, (columns,) int64."""

    class_of: Tensor
    task_of: Tensor


class BestBoxes(NamedTuple):
    """The best scores of a batch in tensors of a fixed size N, best first.

    boxes (B, N, 9), scores (B, N), labels (B, N) int64; is_kept (B, N) bool: inside the range and above the threshold;
    queries (B, N) int64: the matching query of each box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    is_kept: Tensor
    queries: Tensor


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
    decoding = Decoding(max_detections, tuple(post_range), score_threshold)
    best = find_best(predictions, decoding, class_tables(predictions.classes, predictions.logits(0).device))
    return keep_detections(best)


def class_tables(classes: TaskClasses, device: torch.device) -> ClassTables:
    """The tables of a task grouping."""
    labels = [label for members in classes for label in members]
    owners = [task for task, members in enumerate(classes) for _ in members]
    return ClassTables(torch.tensor(labels, device=device), torch.tensor(owners, device=device))


def find_best(predictions: Predictions, decoding: Decoding, tables: ClassTables) -> BestBoxes:
    """:func:`postprocess` up to the selection, whose size depends on values: nothing here waits for the GPU.

    Args:
        tables: on the device of the predictions.
    """
    queries = slice(predictions.num_dn, None)
    best, query, column = select_best(predictions, decoding)
    codes = torch.stack([predictions.codes(task)[-1, :, queries] for task in range(len(predictions.tasks))], dim=1)
    sample = torch.arange(len(best), device=best.device)[:, None]
    boxes = decode_boxes(codes[sample, tables.task_of[column], query])
    is_kept = inside(boxes[..., :3], decoding.post_range)
    if decoding.score_threshold:
        is_kept = is_kept & (best > decoding.score_threshold)
    return BestBoxes(boxes, best, tables.class_of[column], is_kept, query)


def select_best(predictions: Predictions, decoding: Decoding) -> tuple[Tensor, Tensor, Tensor]:
    """The best scores (B, N), the matching query and the column of the class scores that each belongs to."""
    scores = torch.cat(
        [task["cls_logits"][-1, :, predictions.num_dn :].sigmoid() for task in predictions.tasks], dim=-1
    )
    columns = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(decoding.max_detections, scores[0].numel()))
    return best, index // columns, index % columns


def keep_detections(best: BestBoxes) -> list[Detections]:
    """One record per sample, with the boxes that are kept."""
    return [
        Detections(boxes[kept], scores[kept], labels[kept])
        for boxes, scores, labels, kept, _ in zip(*best, strict=True)
    ]
