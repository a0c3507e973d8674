"""Detections in the LiDAR frame <-> nuScenes detection submission (JSON, global frame).

A submission is ``{"meta": {use_camera: ...}, "results": {sample token: [row, ...]}}``; every sample of the split has a
key, also when nothing was detected in it. A row has sample_token, translation (gravity centre, metres), size (width,
length, height), rotation (quaternion w x y z), velocity (x, y in m/s), detection_name, detection_score, attribute_name.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyquaternion import Quaternion

from cmt_aqr.boxes import Detections
from cmt_aqr.classes import CLASSES
from cmt_aqr.errors import UserError
from cmt_aqr.files import atomic_path

# Metres from the ego vehicle within which the benchmark scores a class (configuration detection_cvpr_2019).
CLASS_RANGE = {
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}
# The benchmark refuses a submission with more boxes in one sample.
MAX_BOXES_PER_SAMPLE = 500
# Metres per second above which an object counts as moving when its attribute is chosen.
MOVING_SPEED = 0.2
# How far rows of a pose may be from orthonormal: poses stored as float32 are off by a few 1e-7.
ROTATION_TOLERANCE = 1e-5

# Class -> attribute of a moving object, attribute of a still one.
_ATTRIBUTES = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "barrier": ("", ""),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "traffic_cone": ("", ""),
}


class EvaluationError(UserError):
    """A submission, a split or a data set that cannot be evaluated; the message is one sentence for the user."""


def attribute_name(class_name: str, speed: float) -> str:
    """The attribute that a detection of this class gets from its speed alone.

    Args:
        class_name: one of ``classes.CLASSES``.
        speed: m/s, in the ground plane; more than ``MOVING_SPEED`` is moving.

    Returns:
        A nuScenes attribute name, "" for classes that have none.

    *Source*: mmdet3d ``NuScenesDataset._format_bbox`` and ``DefaultAttribute``.
    """
    moving, still = _ATTRIBUTES[class_name]
    return moving if speed > MOVING_SPEED else still


def detections_to_submission(
    tokens: Sequence[str],
    detections: Sequence[Detections],
    lidar2ego: ArrayLike,
    ego2global: ArrayLike,
    *,
    class_range: dict[str, float] = CLASS_RANGE,
) -> dict[str, list[dict]]:
    """Detections of F frames -> the ``results`` of a submission.

    A box is upright in the LiDAR frame; the whole rotation of the frame is applied to it, so a leaning LiDAR gives a
    leaning box (the benchmark reads only its heading). Boxes further from the ego origin (ground plane) than their
    class's range are dropped, and of the rest the best 500 of a frame are kept.

    Args:
        tokens: F sample tokens.
        detections: F records, LiDAR frame, best first.
        lidar2ego, ego2global: (F, 4, 4) rigid transforms of the LiDAR's own time stamp. Give ego2global in float64:
            float32 loses 0.1 mm at a kilometre.
        class_range: class name -> metres.

    Returns:
        token -> rows, best first; a frame without detections has an empty list.

    Raises:
        EvaluationError: lengths differ, a token comes twice, a pose is no rigid transform, or a box is not finite or
            has no positive size.

    *Source*: mmdet3d ``output_to_nusc_box`` and ``lidar_nusc_box_to_global`` (mmdet3d/datasets/nuscenes_dataset.py).
    """
    lidar2ego = np.asarray(lidar2ego, dtype=np.float64)
    ego2global = np.asarray(ego2global, dtype=np.float64)
    expected = (len(tokens), 4, 4)
    if len(detections) != len(tokens) or lidar2ego.shape != expected or ego2global.shape != expected:
        raise EvaluationError(
            f"{len(tokens)} sample tokens need as many detections (got {len(detections)}) and poses of shape "
            f"{expected} (got lidar2ego {lidar2ego.shape}, ego2global {ego2global.shape})"
        )
    results: dict[str, list[dict]] = {}
    for i, token in enumerate(tokens):
        if token in results:
            raise EvaluationError(f"sample {token} has detections twice")
        results[token] = _frame_rows(token, detections[i], lidar2ego[i], ego2global[i], class_range)
    return results


def submission_to_detections(rows: Sequence[dict], lidar2ego: ArrayLike, ego2global: ArrayLike) -> Detections:
    """Rows of one frame -> detections in the LiDAR frame, the inverse of :func:`detections_to_submission`.

    Args:
        rows: rows of one sample.
        lidar2ego, ego2global: (4, 4) rigid transforms.

    Returns:
        float32 detections, best first; yaw is the heading in the LiDAR's x-y plane.

    Raises:
        EvaluationError: a pose is no rigid transform, or a row lacks a field or names an unknown class.
    """
    poses = (np.asarray(ego2global, np.float64), np.asarray(lidar2ego, np.float64))
    boxes = np.zeros((len(rows), 9))
    try:
        labels = [CLASSES.index(row["detection_name"]) for row in rows]
        scores = np.array([row["detection_score"] for row in rows], np.float64)
        for box, row in zip(boxes, rows, strict=True):
            width, length, height = row["size"]
            heading = Quaternion(row["rotation"]).rotate([1.0, 0.0, 0.0])
            centre, velocity = np.array(row["translation"], np.float64), np.array([*row["velocity"], 0.0])
            for pose in poses:
                inverse = np.linalg.inv(pose)
                centre = inverse[:3, :3] @ centre + inverse[:3, 3]
                heading, velocity = inverse[:3, :3] @ heading, inverse[:3, :3] @ velocity
            box[:] = (*centre, length, width, height, np.arctan2(heading[1], heading[0]), *velocity[:2])
    except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise EvaluationError(f"a result row cannot be read: {error!r}") from error
    order = np.argsort(-scores, kind="stable")
    return Detections(
        boxes=torch.from_numpy(boxes[order]).float(),
        scores=torch.from_numpy(scores[order]).float(),
        labels=torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(order)],
    )


def write_submission(
    path: str | os.PathLike, results: dict[str, list[dict]], *, use_camera: bool, use_lidar: bool
) -> Path:
    """Write a submission whole or not at all (a neighbour file, then a rename).

    Args:
        path: the JSON file; its folder is made.
        results: token -> rows.
        use_camera, use_lidar: the sensors that the model saw, for the ``meta`` field.

    Returns:
        The path.

    Raises:
        EvaluationError: the file cannot be written.
    """
    path = Path(path)
    meta = {
        "use_camera": use_camera, "use_lidar": use_lidar, "use_radar": False, "use_map": False, "use_external": False,
    }  # fmt: skip
    try:
        with atomic_path(path) as part, open(part, "w", encoding="utf-8") as file:
            file.write(f'{{"meta": {json.dumps(meta)}, "results": {{')
            # A sample at a time: json.dump would be several times slower, one json.dumps would need the memory twice.
            for i, (token, rows) in enumerate(results.items()):
                file.write(f"{',' if i else ''}\n{json.dumps(token)}: {json.dumps(rows)}")
            file.write("\n}}\n")
    except OSError as error:
        raise EvaluationError(f"{path}: the submission cannot be written: {error.strerror}") from error
    return path


def read_submission(path: str | os.PathLike) -> tuple[dict, dict[str, list[dict]]]:
    """Read a submission and check its outline (the rows are checked by who uses them).

    Returns:
        meta, and results: token -> rows.

    Raises:
        EvaluationError: no such file, no JSON, or not a submission.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise EvaluationError(f"{path}: the submission cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: the submission is no valid JSON: {error}") from error
    for key in ("meta", "results"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise EvaluationError(f"{path}: a submission needs the field {key!r} with an object in it")
    for token, rows in content["results"].items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise EvaluationError(f"{path}: results of sample {token} must be a list of rows")
    return content["meta"], content["results"]


def _frame_rows(
    token: str, detections: Detections, lidar2ego: np.ndarray, ego2global: np.ndarray, class_range: dict[str, float]
) -> list[dict]:
    """Rows of one frame; poses (4, 4) float64."""
    boxes = detections.boxes.detach().cpu().double().numpy()
    scores = detections.scores.detach().cpu().double().numpy()
    labels = detections.labels.cpu().numpy()
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and (boxes[:, 3:6] > 0).all()):
        raise EvaluationError(f"sample {token}: a detection is not finite or has a size that is not positive")
    rotation = _rotation(ego2global, "ego2global", token) * _rotation(lidar2ego, "lidar2ego", token)

    centre_ego = boxes[:, :3] @ lidar2ego[:3, :3].T + lidar2ego[:3, 3]
    limit = np.array([class_range[CLASSES[label]] for label in labels])
    kept = np.flatnonzero(np.hypot(centre_ego[:, 0], centre_ego[:, 1]) <= limit)[:MAX_BOXES_PER_SAMPLE]
    boxes = boxes[kept]

    translation = centre_ego[kept] @ ego2global[:3, :3].T + ego2global[:3, 3]
    quaternion = _turned(rotation.q, boxes[:, 6])
    velocity = boxes[:, 7:9] @ rotation.rotation_matrix[:2, :2].T
    speed = np.hypot(velocity[:, 0], velocity[:, 1])
    names = [CLASSES[label] for label in labels[kept]]
    return [
        {
            "sample_token": token,
            "translation": translation[i].tolist(),
            "size": boxes[i, [4, 3, 5]].tolist(),
            "rotation": quaternion[i].tolist(),
            "velocity": velocity[i].tolist(),
            "detection_name": name,
            "detection_score": float(scores[kept[i]]),
            "attribute_name": attribute_name(name, speed[i]),
        }
        for i, name in enumerate(names)
    ]


def _rotation(pose: np.ndarray, name: str, token: str) -> Quaternion:
    """Rotation of a rigid transform (4, 4)."""
    try:
        if not np.isfinite(pose).all():
            raise ValueError("not finite")
        return Quaternion(matrix=pose[:3, :3], rtol=ROTATION_TOLERANCE, atol=ROTATION_TOLERANCE).normalised
    except ValueError as error:
        raise EvaluationError(f"sample {token}: {name} is no rigid transform ({error})") from error


def _turned(quaternion: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Quaternion (4,) w x y z, times a turn by yaw (N,) about z -> (N, 4)."""
    w, x, y, z = quaternion
    cos, sin = np.cos(yaw / 2), np.sin(yaw / 2)
    return np.stack((w * cos - z * sin, x * cos + y * sin, y * cos - x * sin, w * sin + z * cos), axis=-1)
