"""Detections with the queries that made them, and all of it in one tensor for one transfer from the device.

Shape letters: B batch, N boxes, Q matching queries, G grids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmt_aqr.box_format import BOX_SIZE
from cmt_aqr.boxes import Detections
from cmt_aqr.evaluation.postprocess import BestBoxes

# Columns of a packed box behind its geometry.
SCORE, LABEL, IS_KEPT, QUERY, WEIGHTS = range(BOX_SIZE, BOX_SIZE + 5)


class Found(NamedTuple):
    """What was found in one frame.

    detections: best first; queries (N,) int64: the matching query of each box; aqr_weights (N, G) of these queries,
    None without AQR.
    """

    detections: Detections
    queries: Tensor
    aqr_weights: Tensor | None


def pack(best: BestBoxes, aqr_weights: Tensor | None) -> Tensor:
    """(B, N, WEIGHTS + G) in the dtype of the boxes: box, score, label, whether it is kept, query, its AQR weights.

    Args:
        aqr_weights: (B, Q, G); None is G = 0.
    """
    boxes, *rest = best
    columns = [boxes, *(x[..., None].to(boxes.dtype) for x in rest)]
    if aqr_weights is not None:
        columns.append(aqr_weights.take_along_dim(best.queries[..., None], dim=1).to(boxes.dtype))
    return torch.cat(columns, dim=-1)


def find_kept(packed: Tensor) -> list[Found]:
    """One record per sample, with the boxes that are kept."""
    found = []
    for sample in packed:
        rows = sample[sample[:, IS_KEPT] > 0]
        detections = Detections(rows[:, :BOX_SIZE], rows[:, SCORE], rows[:, LABEL].long())
        weights = rows[:, WEIGHTS:] if rows.shape[1] > WEIGHTS else None
        found.append(Found(detections, rows[:, QUERY].long(), weights))
    return found
