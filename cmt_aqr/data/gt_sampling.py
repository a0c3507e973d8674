"""GT-sampling: objects of other frames pasted into a sample, points and image patches together.

*Source*: CMT `UnifiedObjectSample`, `UnifiedDataBaseSampler`; UVTR (Li et al. 2022) for the image part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import cv2
import numpy as np
import torch
from torch import Tensor

from cmt_aqr.boxes import Targets
from cmt_aqr.classes import CLASSES
from cmt_aqr.data.gt_database import GtDatabase, points_of_boxes, project_boxes
from cmt_aqr.data.sample import Sample

# Number of objects of each class up to which objects are pasted into a frame, as in the original configs.
ORIGINAL_COUNTS = MappingProxyType(
    {
        "car": 2,
        "truck": 3,
        "construction_vehicle": 7,
        "bus": 4,
        "trailer": 6,
        "barrier": 2,
        "motorcycle": 6,
        "bicycle": 6,
        "pedestrian": 2,
        "traffic_cone": 2,
    }
)
# Share of a patch in the pasted pixels, the rest is the image (`mixup_rate` of the original configs).
ORIGINAL_MIX = 0.5


def bev_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Which boxes overlap seen from above: separating-axis test of rotated rectangles; boxes that touch overlap.

    Args:
        boxes: (N, 9).
        others: (M, 9).

    Returns:
        (N, M) bool.
    """
    offset = others[None, :, :2] - boxes[:, None, :2]
    turn = others[None, :, 6] - boxes[:, None, 6]
    cos, sin = turn.cos().abs(), turn.sin().abs()
    overlap = torch.ones(turn.shape, dtype=torch.bool)
    for yaw, own, foreign in (
        (boxes[:, None, 6], boxes[:, None], others[None]),
        (others[None, :, 6], others[None], boxes[:, None]),
    ):
        along = offset[..., 0] * yaw.cos() + offset[..., 1] * yaw.sin()
        across = -offset[..., 0] * yaw.sin() + offset[..., 1] * yaw.cos()
        overlap &= 2 * along.abs() <= own[..., 3] + foreign[..., 3] * cos + foreign[..., 4] * sin
        overlap &= 2 * across.abs() <= own[..., 4] + foreign[..., 3] * sin + foreign[..., 4] * cos
    return overlap


class GtSampler:
    """Pastes objects of a database into frames, up to a number of objects for each class."""

    def __init__(self, database: GtDatabase, *, counts: Mapping[str, int] = ORIGINAL_COUNTS, mix: float = ORIGINAL_MIX):
        """Set up.

        Args:
            database: objects to draw from.
            counts: class name -> number of objects a frame should have at least.
            mix: share of a patch in the pasted pixels, 0..1.

        Raises:
            ValueError: unknown class name.
        """
        unknown = sorted(set(counts) - set(CLASSES))
        if unknown:
            raise ValueError(
                f"GtSampler: counts has unknown class {unknown[0]!r}, expected one of {', '.join(CLASSES)}"
            )
        self._database = database
        self._boxes = torch.from_numpy(database.boxes)
        self._counts = {CLASSES.index(name): count for name, count in counts.items()}
        self._members = {label: np.flatnonzero(database.labels == label) for label in self._counts}
        self._mix = mix

    def choose(self, targets: Targets, rng: np.random.Generator) -> list[int]:
        """Draw database objects that collide neither with the frame's boxes nor with each other.

        Args:
            targets: the frame's own boxes.
            rng: numpy generator.

        Returns:
            Database indices; a class gets at most as many as it lacks.
        """
        candidates: list[int] = []
        for label, count in self._counts.items():
            members = self._members[label]
            missing = min(count - int((targets.labels == label).sum()), len(members))
            if missing > 0:
                candidates += rng.choice(members, missing, replace=False).tolist()
        boxes = self._boxes[candidates]
        meets_frame = bev_overlap(boxes, targets.boxes).any(dim=1).tolist()
        meets = bev_overlap(boxes, boxes).tolist()
        chosen: list[int] = []
        for i in range(len(candidates)):
            if not meets_frame[i] and not any(meets[i][j] for j in chosen):
                chosen.append(i)
        return [candidates[i] for i in chosen]

    def paste(self, sample: Sample, views: Sequence[np.ndarray] | None, rng: np.random.Generator) -> Sample:
        """Paste objects into a sample.

        Args:
            sample: not yet augmented; `lidar2img` in pixels of `views`. Points may be None.
            views: images as on disk, changed in place; None: no images.
            rng: numpy generator.

        Returns:
            The sample with more boxes; points inside the new boxes are replaced by the objects' own.
        """
        chosen = self.choose(sample.targets, rng)
        if not chosen:
            return sample
        new = Targets(self._boxes[chosen], torch.from_numpy(self._database.labels[chosen]))
        if views is not None:
            self._paste_patches(new.boxes, chosen, sample.lidar2img, views)
        points = sample.points
        if points is not None:
            keep = torch.ones(len(points), dtype=torch.bool)
            keep[torch.cat(points_of_boxes(points, new.boxes))] = False
            points = torch.cat((points[keep], *(self._database.points(i) for i in chosen)))
        boxes = torch.cat((sample.targets.boxes, new.boxes))
        return replace(sample, points=points, targets=Targets(boxes, torch.cat((sample.targets.labels, new.labels))))

    def _paste_patches(
        self, boxes: Tensor, chosen: Sequence[int], lidar2img: Tensor, views: Sequence[np.ndarray]
    ) -> None:
        """Blend the objects' patches into the views, from far to near; the frame's own objects do not cover them.

        The original draws the frame's own objects again, in the same order of depth, but its crops of them share the
        memory of the image that it paints: each is blended with itself, which changes nothing. *Quirk F34*.
        """
        patches = [self._database.patch(i) for i in chosen]
        for matrix, view in zip(lidar2img, views, strict=True):
            rectangles, depth, visible = project_boxes(boxes, matrix, view.shape[:2])
            drawable = visible & ((rectangles[:, 2:] - rectangles[:, :2]) > 1).all(dim=1)
            rectangles = rectangles.tolist()
            for i in depth.argsort(descending=True).tolist():
                if drawable[i] and patches[i] is not None:
                    _blend(_cut(view, rectangles[i]), patches[i], self._mix)


def _cut(view: np.ndarray, rectangle: Sequence[int]) -> np.ndarray:
    x0, y0, x1, y1 = rectangle
    return view[y0:y1, x0:x1]


def _blend(region: np.ndarray, patch: np.ndarray, mix: float) -> None:
    if patch.shape != region.shape:
        patch = cv2.resize(patch, (region.shape[1], region.shape[0]), interpolation=cv2.INTER_LINEAR)
    region[:] = cv2.addWeighted(region, 1 - mix, patch, mix, 0)
