"""The smallest data set that the devkit loads: the 13 tables of a few scenes, no sensor files."""

import json
from pathlib import Path

import cv2
import numpy as np

VERSION = "v1.0-tiny"


def write(
    root: Path,
    *,
    scenes: dict[str, int],
    boxes: list[tuple[str, tuple[float, float, float]]],
    splits: dict[str, list[str]],
    version: str = VERSION,
) -> Path:
    """Write tables: every sample holds ``boxes`` (category, translation), 1 x 2 x 1 m, still, with one LiDAR point.

    The ego stands at the origin of the world. Sample tokens are ``<scene>-<index>``.
    """
    folder = root / version
    folder.mkdir(parents=True)
    categories = sorted({category for category, _ in boxes}) or ["vehicle.car"]
    tables: dict[str, list[dict]] = {
        "category": [{"token": _category_token(c), "name": c, "description": ""} for c in categories],
        "attribute": [{"token": "parked", "name": "vehicle.parked", "description": ""}],
        "visibility": [{"token": "4", "level": "v80-100", "description": ""}],
        "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [{
            "token": "calibration", "sensor_token": "lidar", "translation": [0, 0, 0], "rotation": [1, 0, 0, 0],
            "camera_intrinsic": [],
        }],
        "ego_pose": [{"token": "pose", "timestamp": 0, "rotation": [1, 0, 0, 0], "translation": [0, 0, 0]}],
        "log": [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": "nowhere"}],
        "map": [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "map.png"}],
        "scene": [], "sample": [], "sample_data": [], "instance": [], "sample_annotation": [],
    }  # fmt: skip
    for scene, count in scenes.items():
        tables["scene"].append({"token": f"scene-{scene}", "name": scene, "log_token": "log", "nbr_samples": count})
        for i in range(count):
            token = f"{scene}-{i}"
            tables["sample"].append({"token": token, "timestamp": i, "scene_token": f"scene-{scene}"})
            tables["sample_data"].append({
                "token": f"data-{token}", "sample_token": token, "ego_pose_token": "pose", "is_key_frame": True,
                "calibrated_sensor_token": "calibration", "filename": "none.bin", "timestamp": i, "prev": "",
            })  # fmt: skip
            for j, (category, translation) in enumerate(boxes):
                name = f"{token}-{j}"
                tables["instance"].append({"token": f"instance-{name}", "category_token": _category_token(category)})
                tables["sample_annotation"].append({
                    "token": name, "sample_token": token, "instance_token": f"instance-{name}", "size": [1, 2, 1],
                    "translation": list(translation), "rotation": [1, 0, 0, 0], "prev": "", "next": "",
                    "attribute_tokens": ["parked"] if category.startswith("vehicle") else [], "visibility_token": "4",
                    "num_lidar_pts": 1, "num_radar_pts": 0,
                })  # fmt: skip
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "splits.json").write_text(json.dumps(splits))
    cv2.imwrite(str(root / "map.png"), np.zeros((8, 8), np.uint8))
    return root


def _category_token(name: str) -> str:
    return "category-" + name.replace(".", "-")


def row(token: str, translation: tuple[float, float, float], score: float = 0.5, **changes: object) -> dict:
    """A result row that fits a still car of :func:`write`."""
    return {
        "sample_token": token, "translation": list(translation), "size": [1, 2, 1], "rotation": [1, 0, 0, 0],
        "velocity": [0, 0], "detection_name": "car", "detection_score": score, "attribute_name": "vehicle.parked",
    } | changes  # fmt: skip
