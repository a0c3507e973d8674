"""The real nuScenes frame as detections, when it is there (it is never part of this repository)."""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.classes import CLASSES

ROOT = Path(os.environ.get("CMT_AQR_REAL_FRAME") or Path(__file__).parents[3] / "../shared/nuscenes-one").resolve()
VERSION = "v1.0-mini"
SPLIT = "one_frame"
VELOCITIES = ROOT / "velocities.json"

needs_frame = pytest.mark.skipif(
    not (ROOT / "infos.json").is_file(),
    reason="the real frame is absent: set CMT_AQR_REAL_FRAME or unpack it to ../shared/nuscenes-one",
)


@lru_cache
def info() -> dict:
    return json.loads((ROOT / "infos.json").read_text())


def token() -> str:
    return info()["sample_token"]


def poses() -> tuple[np.ndarray, np.ndarray]:
    """lidar2ego, ego2global, each (1, 4, 4)."""
    lidar = info()["lidar"]
    return np.array([lidar["lidar2ego"]]), np.array([lidar["ego2global"]])


def objects() -> list[dict]:
    """Annotations of the ten classes that have a point inside: what the benchmark scores."""
    return [o for o in info()["objects"] if o["class_name"] and o["valid"]]


def targets() -> Targets:
    """Ground truth, float64; unknown velocities are 0."""
    rows = [
        [*o["center_lidar"], *o["size_lwh"], o["yaw_lidar"], *(o["velocity_lidar_xy"] or (0, 0))] for o in objects()
    ]
    labels = [CLASSES.index(o["class_name"]) for o in objects()]
    return Targets(torch.tensor(rows, dtype=torch.float64), torch.tensor(labels))


def perfect_detections() -> Detections:
    """The ground truth with descending scores."""
    truth = targets()
    return Detections(truth.boxes, 1 - 0.001 * torch.arange(len(truth.boxes), dtype=torch.float64), truth.labels)
