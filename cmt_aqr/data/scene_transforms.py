"""Scene augmentation in the LiDAR frame: rotation, scale, translation and flips as one 4 x 4 matrix, and filters.

Every function returns a new `Sample`; `lidar2img`, `lidar2global` and `augmentation` follow the points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.boxes import Targets
from cmt_aqr.data.sample import Sample


@dataclass(frozen=True)
class SceneDraw:
    """One scene augmentation: rotate about z, scale, translate, then flip.

    Attributes:
        rotation: radians, counter-clockwise about +z.
        scale: factor on all three axes.
        translation: metres, x y z.
        flip_y: y -> -y (the original calls it horizontal).
        flip_x: x -> -x (vertical).
    """

    rotation: float
    scale: float
    translation: tuple[float, float, float]
    flip_y: bool
    flip_x: bool


@dataclass(frozen=True)
class SceneAugmentation:
    """Ranges of the random scene augmentation of training; the defaults are the original's.

    Attributes:
        rotation_range: radians, uniform.
        scale_range: factor, uniform.
        translation_std: metres, normal, per axis.
        flip_y_probability: probability of y -> -y.
        flip_x_probability: probability of x -> -x.
    """

    rotation_range: tuple[float, float] = (-0.785, 0.785)
    scale_range: tuple[float, float] = (0.9, 1.1)
    translation_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    flip_y_probability: float = 0.5
    flip_x_probability: float = 0.5


@dataclass(frozen=True)
class ModalityDropout:
    """How often one whole sensor is blanked in training (Quirk Q17).

    Attributes:
        image_probability: all images become 0 (before normalisation, so -mean/std after it).
        point_probability: all points become 0 0 0 0 0; they are not removed, and move with the scene augmentation.
    """

    image_probability: float = 0.25
    point_probability: float = 0.25


def draw_scene_augmentation(
    rng: np.random.Generator | np.random.RandomState, augmentation: SceneAugmentation
) -> SceneDraw:
    """Draw one scene augmentation.

    Args:
        rng: numpy generator; distributions and order are the original's.
        augmentation: the ranges.

    *Source*: CMT `GlobalRotScaleTransAll`, `CustomRandomFlip3D`.
    """
    rotation = float(rng.uniform(*augmentation.rotation_range))
    scale = float(rng.uniform(*augmentation.scale_range))
    translation = tuple(float(t) for t in rng.normal(scale=np.float32(augmentation.translation_std), size=3))
    flip_y = bool(rng.uniform() < augmentation.flip_y_probability)
    flip_x = bool(rng.uniform() < augmentation.flip_x_probability)
    return SceneDraw(rotation, scale, translation, flip_y, flip_x)


def scene_matrix(draw: SceneDraw) -> Tensor:
    """LiDAR frame -> augmented LiDAR frame, (4, 4) float64: flips @ translation @ scale @ rotation."""
    cos, sin = math.cos(draw.rotation) * draw.scale, math.sin(draw.rotation) * draw.scale
    x, y, z = draw.translation
    matrix = torch.tensor(
        [[cos, -sin, 0, x], [sin, cos, 0, y], [0, 0, draw.scale, z], [0, 0, 0, 1]], dtype=torch.float64
    )
    if draw.flip_x:
        matrix[0] = -matrix[0]
    if draw.flip_y:
        matrix[1] = -matrix[1]
    return matrix


def transform_boxes(boxes: Tensor, draw: SceneDraw) -> Tensor:
    """Boxes (G, 9) in the augmented frame, same dtype; sizes and velocities scale too, NaN velocities stay NaN.

    *Source*: mmdet3d `LiDARInstance3DBoxes.rotate / scale / translate / flip`, with gravity centres.
    """
    matrix = scene_matrix(draw).to(boxes.dtype)
    centre = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    velocity = boxes[:, 7:9] @ matrix[:2, :2].T
    yaw = boxes[:, 6] + draw.rotation
    if draw.flip_y:
        yaw = -yaw
    if draw.flip_x:
        yaw = math.pi - yaw
    return torch.cat((centre, boxes[:, 3:6] * draw.scale, yaw[:, None], velocity), dim=1)


def transform_scene(sample: Sample, draw: SceneDraw) -> Sample:
    """Move points, boxes and every matrix of a sample into the augmented frame."""
    matrix = scene_matrix(draw)
    points = sample.points
    if points is not None:
        moved = matrix.to(points.dtype)
        points = torch.cat((points[:, :3] @ moved[:3, :3].T + moved[:3, 3], points[:, 3:]), dim=1)
    inverse = torch.linalg.inv(matrix)
    return replace(
        sample,
        points=points,
        targets=Targets(transform_boxes(sample.targets.boxes, draw), sample.targets.labels),
        lidar2img=sample.lidar2img @ inverse,
        lidar2global=sample.lidar2global @ inverse,
        augmentation=matrix @ sample.augmentation,
    )


def filter_points(points: Tensor, point_range: Sequence[float]) -> Tensor:
    """Points (P, 5) strictly inside x_min y_min z_min x_max y_max z_max in metres.

    *Source*: mmdet3d `PointsRangeFilter`.
    """
    low, high = points.new_tensor(point_range[:3]), points.new_tensor(point_range[3:])
    return points[((points[:, :3] > low) & (points[:, :3] < high)).all(dim=1)]


def filter_targets(targets: Targets, point_range: Sequence[float]) -> Targets:
    """Boxes whose BEV centre is strictly inside the range, with yaw wrapped to [-pi, pi).

    *Source*: mmdet3d `ObjectRangeFilter`.
    """
    low, high = targets.boxes.new_tensor(point_range[:2]), targets.boxes.new_tensor(point_range[3:5])
    inside = ((targets.boxes[:, :2] > low) & (targets.boxes[:, :2] < high)).all(dim=1)
    boxes = targets.boxes[inside]
    boxes[:, 6] -= torch.floor(boxes[:, 6] / (2 * math.pi) + 0.5) * (2 * math.pi)
    return Targets(boxes, targets.labels[inside])


def shuffle_points(points: Tensor, rng: np.random.Generator) -> Tensor:
    """Points (P, 5) in random order, so that the ten points that a full voxel keeps are random."""
    return points[torch.from_numpy(rng.permutation(len(points)))]


def draw_dropout(rng: np.random.Generator, dropout: ModalityDropout) -> tuple[bool, bool]:
    """Whether to blank (images, points); never both. *Source*: CMT `ModalMask3D`. *Quirk Q17*."""
    draw = rng.uniform()
    drop_images = draw >= 1 - dropout.image_probability
    drop_points = not drop_images and draw >= 1 - dropout.image_probability - dropout.point_probability
    return bool(drop_images), bool(drop_points)
