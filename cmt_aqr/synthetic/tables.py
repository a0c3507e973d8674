"""nuScenes' tables: tokens, the rows that never change, and writing them as stable JSON."""

import hashlib
import json
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

import numpy as np

from cmt_aqr.files import write_bytes
from cmt_aqr.synthetic.calibration import (
    CAMERAS,
    LIDAR_CHANNEL,
    LIDAR_ROTATION,
    LIDAR_TRANSLATION,
    intrinsic_matrix,
    unit_quaternion,
)
from cmt_aqr.synthetic.objects import CATEGORIES

VERSION = "v1.0-synthetic"
"""Name of the table folder, and the version that nuScenes-devkit is asked for."""

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
VISIBILITY_LEVELS = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", 1.0))
_VISIBILITY_TOPS = [top for _, _, top in VISIBILITY_LEVELS]

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)

LOG_NAME = "synthetic"
MAP_FILE = "maps/blank.png"


@lru_cache(maxsize=4096)
def token(*words: object) -> str:
    """A 32-digit token that depends on the words alone."""
    return hashlib.md5("/".join(map(str, words)).encode(), usedforsecurity=False).hexdigest()


def fixed_tables(image_size: tuple[int, int]) -> dict[str, list[dict]]:
    """The rows of the tables that are the same for every world of an image size (width, height)."""
    channels = [LIDAR_CHANNEL, *(camera.channel for camera in CAMERAS)]
    log = token("log", LOG_NAME)
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": f"synthetic {label}"}
            for label, name in CATEGORIES.items()
        ],
        "attribute": [{"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES],
        "visibility": [
            {"token": level, "level": name, "description": f"at most {top:.0%} of the object is visible"}
            for level, name, top in VISIBILITY_LEVELS
        ],
        "sensor": [
            {
                "token": token("sensor", channel),
                "channel": channel,
                "modality": "lidar" if channel == LIDAR_CHANNEL else "camera",
            }
            for channel in channels
        ],
        "calibrated_sensor": [
            _calibration(LIDAR_CHANNEL, LIDAR_TRANSLATION, LIDAR_ROTATION, image_size, []),
            *(
                _calibration(
                    camera.channel,
                    camera.translation,
                    camera.rotation,
                    image_size,
                    intrinsic_matrix(camera, image_size).tolist(),
                )
                for camera in CAMERAS
            ),
        ],
        "log": [
            {
                "token": log,
                "logfile": LOG_NAME,
                "vehicle": "synthetic",
                "date_captured": "2020-01-01",
                "location": "synthetic-street",
            }
        ],
        "map": [
            {"token": token("map", LOG_NAME), "log_tokens": [log], "category": "semantic_prior", "filename": MAP_FILE}
        ],
    }


def calibration_token(channel: str, image_size: tuple[int, int]) -> str:
    """Token of the calibrated_sensor row of a channel."""
    return token("calibrated_sensor", channel, *image_size)


def _calibration(channel: str, translation, rotation, image_size, intrinsic) -> dict:
    return {
        "token": calibration_token(channel, image_size),
        "sensor_token": token("sensor", channel),
        "translation": [float(value) for value in translation],
        "rotation": unit_quaternion(rotation).tolist(),
        "camera_intrinsic": intrinsic,
    }


def visibility_level(fraction: float) -> str:
    """Token of the visibility row for a visible share of 0..1."""
    return VISIBILITY_LEVELS[bisect_left(_VISIBILITY_TOPS, fraction - 1e-9)][0]


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as a JSON list, one row a line. Rows hold no objects, and no text that looks like the end of one."""
    text = json.dumps(rows, allow_nan=False)  # all at once: an encoder a row takes twice as long
    write_bytes(path, ("[\n" + text[1:-1].replace("}, {", "},\n{") + "\n]\n").encode())


def blank_map() -> np.ndarray:
    """The placeholder picture that the devkit wants for every map row."""
    return np.full((16, 16), 255, dtype=np.uint8)
