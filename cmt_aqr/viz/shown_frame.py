"""One frame with what one or two detectors found in it, and the pictures of it."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.viz.box_groups import Style, match_outcomes
from cmt_aqr.viz.pictures import draw_detections, side_by_side
from cmt_aqr.viz.query_panels import QueryMap, draw_queries


class Answer(NamedTuple):
    """What a detector found: N detections, AQR's weights (N, 2) of LiDAR and cameras or None, maps of its attention."""

    detections: Detections
    weights: Tensor | None
    maps: tuple[QueryMap, ...] = ()


@dataclass(frozen=True)
class ShownFrame:
    """Everything that is shown of one frame.

    Attributes:
        name: of its file, without the suffix.
        title: above its picture.
        images: (V, H, W, 3) uint8 RGB, or None.
        points: (P, >=3) metres, LiDAR frame, or None.
        lidar2img: (V, 4, 4) to pixels of the images, or None.
        answers: name of a detector -> what it found; none, one or two.
        targets: ground truth, or None.
        failed: see :class:`Style`.
        condition: "clean", or the failure.
    """

    name: str
    title: str
    images: Tensor | None
    points: Tensor | None
    lidar2img: Tensor | None
    answers: dict[str, Answer]
    targets: Targets | None
    failed: dict[str, str] = field(default_factory=dict)
    condition: str = "clean"


def draw_frame(frame: ShownFrame, style: Style) -> np.ndarray:
    """The picture of a frame (height, width, 3); two detectors stand beside each other."""
    style = replace(style, failed=frame.failed, is_tall=len(frame.answers) > 1)
    parts = []
    for name, answer in frame.answers.items() or [("", Answer(None, None))]:
        parts.append(
            draw_detections(
                frame.images,
                frame.points,
                frame.lidar2img,
                detections=answer.detections,
                targets=frame.targets,
                weights=answer.weights,
                title=f"{name}, {frame.condition}" if style.is_tall else frame.title,
                style=style,
            )
        )
    return side_by_side(*parts) if len(parts) == 2 else parts[0]


def draw_attention(frame: ShownFrame, style: Style) -> dict[str, np.ndarray]:
    """Letter of a detector -> the picture of the attention of its queries, where there are maps of it."""
    data = frame.images, frame.points, frame.lidar2img
    return {
        letter: draw_queries(answer.maps, *data, f"{name}, {frame.title}: attention", style.cameras)
        for letter, (name, answer) in zip("ab", frame.answers.items(), strict=False)
        if answer.maps
    }


def count_outcomes(detections: Detections, targets: Targets, score_threshold: float) -> np.ndarray:
    """Hits, false alarms and missed objects of one frame, from detections of this score on."""
    kept = detections.scores >= score_threshold
    detections = Detections(detections.boxes[kept], detections.scores[kept], detections.labels[kept])
    is_hit, is_found = match_outcomes(detections, targets)
    hits = int(is_hit.sum())
    return np.array([hits, len(is_hit) - hits, len(is_found) - int(is_found.sum())])
