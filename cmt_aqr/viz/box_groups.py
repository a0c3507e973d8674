"""Which boxes of a frame are drawn, and how: colours by class, by hit and miss, or by the trust in a sensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.viz.paint import CLASS_COLOURS, GREY, WHITE, Colour

ColourBy = Literal["class", "outcome", "trust"]
# A detection hits an object of its class when their centres are closer than this on the ground, in metres: the
# distance at which nuScenes measures its true-positive errors.
HIT_DISTANCE = 2.0

# Okabe and Ito's colours, told apart by colour-blind people.
HIT: Colour = (86, 180, 233)
FALSE_ALARM: Colour = (230, 110, 20)
MISSED: Colour = (240, 228, 66)
# Ends of the colour scale of trust; its middle is white.
TRUST_CAMERA: Colour = (230, 110, 20)
TRUST_LIDAR: Colour = (60, 160, 235)


@dataclass(frozen=True)
class Style:
    """What is drawn of a frame, and how.

    Attributes:
        score_threshold: detections with a lower score are left out.
        max_boxes: most detections, which are those with the best scores, and most objects, which are the nearest.
        colour_by: "class"; "outcome": hits, false alarms and missed objects; "trust": from cameras to LiDAR, by the
            weights of AQR.
        cameras: names of the views.
        failed: camera, or "lidar", -> what failed there, in a few words; its panel gets a frame.
        is_tall: the scene from above is below the views instead of beside them, and the views are smaller.
    """

    score_threshold: float = 0.3
    max_boxes: int = 100
    colour_by: ColourBy = "class"
    cameras: Sequence[str] = CAMERAS
    failed: Mapping[str, str] = field(default_factory=dict)
    is_tall: bool = False


@dataclass(frozen=True)
class BoxGroup:
    """Boxes that are drawn in one style, the nearest last so that they cover what is behind them.

    Attributes:
        boxes: (N, 9) float64.
        colours: of each box.
        captions: of each box; an empty text for a box without one.
        ranks: where captions would overlap, the one of the lowest rank is drawn; empty: that of the largest box.
        is_dashed: thin and dashed instead of solid and filled.
    """

    boxes: np.ndarray
    colours: list[Colour]
    captions: list[str]
    ranks: list[float]
    is_dashed: bool


@dataclass(frozen=True)
class Chosen:
    """The groups of a frame, ground truth below detections, and the counts in words."""

    groups: list[BoxGroup]
    counts: str


def match_outcomes(detections: Detections, targets: Targets, distance: float = HIT_DISTANCE) -> tuple[Tensor, Tensor]:
    """Which detections hit, and which objects are found: the best score chooses first, each object is hit once.

    Args:
        detections: N boxes.
        targets: G boxes.
        distance: metres between the centres on the ground below which a detection hits an object of its class.

    Returns:
        is_hit (N,), is_found (G,), boolean.

    *Source*: nuscenes-devkit ``accumulate``.
    """
    is_hit = torch.zeros(len(detections.scores), dtype=torch.bool)
    is_found = torch.zeros(len(targets.labels), dtype=torch.bool)
    apart = torch.cdist(detections.boxes[:, :2].double(), targets.boxes[:, :2].double())
    apart = apart.masked_fill(detections.labels[:, None] != targets.labels, torch.inf)
    for i in torch.argsort(detections.scores, descending=True, stable=True).tolist():
        own = apart[i].masked_fill(is_found, torch.inf)
        if len(own) and own.min() < distance:
            is_hit[i] = is_found[own.argmin()] = True
    return is_hit, is_found


def trust_colours(weights: np.ndarray) -> list[Colour]:
    """Colours of weights (N, 2) by (w_lidar - w_camera) / 2, from -1 (cameras) to 1 (LiDAR); grey where NaN."""
    colours = []
    for difference in (weights[:, 0] - weights[:, 1]) / 2:
        if np.isnan(difference):
            colours.append(GREY)
            continue
        end = TRUST_LIDAR if difference > 0 else TRUST_CAMERA
        share = min(1.0, abs(float(difference)))
        mixed = [round((1 - share) * white + share * own) for white, own in zip(WHITE, end, strict=True)]
        colours.append((mixed[0], mixed[1], mixed[2]))
    return colours


def choose_boxes(
    detections: Detections | None, targets: Targets | None, weights: Tensor | None, style: Style
) -> Chosen:
    """What to draw.

    Args:
        detections: N boxes, or None.
        targets: ground truth, or None.
        weights: (N, 2) of the detections, LiDAR and cameras; None without AQR.

    Raises:
        ValueError: colours by outcome without both kinds of boxes, or by trust without weights.
    """
    if style.colour_by == "outcome" and (detections is None or targets is None):
        raise ValueError("colours by outcome need detections and ground truth")
    if style.colour_by == "trust" and (detections is None or weights is None):
        raise ValueError("colours by trust need detections and the weights of AQR")
    if detections is not None:
        detections = detections.cpu()
        is_kept = detections.scores >= style.score_threshold
        weights = None if weights is None else weights.cpu()[is_kept]
        detections = Detections(*(part[is_kept] for part in (detections.boxes, detections.scores, detections.labels)))
    targets = None if targets is None else targets.to("cpu")
    outcomes = match_outcomes(detections, targets) if style.colour_by == "outcome" else None
    groups, counts = [], []
    if detections is not None:
        groups.append(_found(detections, weights, outcomes and outcomes[0], style))
        counts.append(_count(len(groups[-1].boxes), len(detections.scores), "best", "detections"))
        counts[-1] += f" with score \N{GREATER-THAN OR EQUAL TO} {style.score_threshold:g}"
    if targets is not None:
        groups.insert(0, _truth(targets, detections is not None, outcomes and outcomes[1], style))
        counts.append(_count(len(groups[0].boxes), len(targets.labels), "nearest", "ground truth"))
    if outcomes is not None:
        hits, found = (int(part.sum()) for part in outcomes)
        counts.append(f"{hits} hits, {len(outcomes[0]) - hits} false alarms, {len(outcomes[1]) - found} missed")
    return Chosen(groups, ", ".join(counts))


def _count(drawn: int, number: int, which: str, name: str) -> str:
    return f"{number} {name}" if drawn == number else f"{drawn} {which} of {number} {name}"


def _found(detections: Detections, weights: Tensor | None, is_hit: Tensor | None, style: Style) -> BoxGroup:
    """Detections, the best ones, far ones first."""
    best = torch.argsort(detections.scores, descending=True, stable=True)[: style.max_boxes]
    order = best[torch.argsort(detections.boxes[best, :2].norm(dim=1), descending=True, stable=True)]
    names = [CLASSES[label] for label in detections.labels[order].tolist()]
    scores = detections.scores[order].tolist()
    if style.colour_by == "trust":
        colours = trust_colours(weights[order].double().numpy())
    elif is_hit is not None:
        colours = [HIT if hit else FALSE_ALARM for hit in is_hit[order].tolist()]
    else:
        colours = [CLASS_COLOURS[name] for name in names]
    captions = [f"{name.replace('_', ' ')} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    boxes = detections.boxes[order].detach().double().numpy()
    return BoxGroup(boxes, colours, captions, [-score for score in scores], is_dashed=False)


def _truth(targets: Targets, is_dashed: bool, is_found: Tensor | None, style: Style) -> BoxGroup:
    """Ground truth, the nearest, far ones first; in the colours of the classes, or as what was missed."""
    nearest = torch.argsort(targets.boxes[:, :2].norm(dim=1), stable=True)[: style.max_boxes]
    order = nearest.flip(0)
    names = [CLASSES[label] for label in targets.labels[order].tolist()]
    captions = [] if is_dashed else [name.replace("_", " ") for name in names]
    if is_found is not None:
        found = is_found[order].tolist()
        colours = [WHITE if is_hit else MISSED for is_hit in found]
        captions = ["" if hit else f"missed {name.replace('_', ' ')}" for hit, name in zip(found, names, strict=True)]
    elif style.colour_by == "trust":
        colours = [WHITE] * len(names)
    else:
        colours = [_pale(CLASS_COLOURS[name]) if is_dashed else CLASS_COLOURS[name] for name in names]
    return BoxGroup(targets.boxes[order].double().numpy(), colours, captions, [], is_dashed)


def _pale(colour: Colour) -> Colour:
    red, green, blue = ((255 + channel) // 2 for channel in colour)
    return red, green, blue
