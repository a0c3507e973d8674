"""An example of the folder that cmt_aqr.tools.from_folder reads."""

import json
from pathlib import Path

import cv2
import numpy as np
from pyquaternion import Quaternion

from cmt_aqr.classes import CAMERAS as CHANNELS
from cmt_aqr.errors import UserError
from cmt_aqr.files import atomic_path, write_bytes
from cmt_aqr.synthetic.calibration import CAMERAS, intrinsic_matrix

FRAMES_FILE = "frames.json"
# x, y, z, intensity.
POINT_COLUMNS = 4
EXAMPLE_SIZE = (160, 90)


class FolderError(UserError):
    """A folder that cannot be turned into a data set; names the file, the frame and the key."""


def write_example(folder: Path) -> None:
    """Write three frames half a second apart: a car that drives ahead, grey images, nuScenes' cameras."""
    if folder.exists():
        raise FolderError(f"{folder} exists already: name another folder, or remove it")
    rng = np.random.default_rng(0)
    with atomic_path(folder) as partial:
        for name in ("images", "clouds"):
            (partial / name).mkdir(parents=True)
        frames = []
        for number, split in enumerate(("own_train", "own_train", "own_val")):
            center = [2.0, 10.0 + 3 * number, -0.9]
            ground = rng.uniform((-30, -30, -1.75, 0), (30, 30, -1.7, 40), (2000, POINT_COLUMNS))
            car = rng.uniform((-0.9, -2.2, -0.7, 20), (0.9, 2.2, 0.7, 90), (200, POINT_COLUMNS))
            car[:, :3] += center
            write_bytes(partial / f"clouds/{number}.bin", np.vstack((ground, car)).astype(np.float32).tobytes())
            image = np.full((EXAMPLE_SIZE[1], EXAMPLE_SIZE[0], 3), 90 + 20 * number, np.uint8)
            for channel in CHANNELS:
                write_bytes(partial / f"images/{number}_{channel}.jpg", cv2.imencode(".jpg", image)[1].tobytes())
            box = {"class": "car", "center": center, "size": [4.6, 1.9, 1.6], "yaw": np.pi / 2, "track": "car 1"}
            frames.append(
                {
                    "scene": split.removeprefix("own_"),
                    "split": split,
                    "time": 0.5 * number,
                    "points": f"clouds/{number}.bin",
                    "images": {channel: f"images/{number}_{channel}.jpg" for channel in CHANNELS},
                    "boxes": [box],
                }
            )
        content = {"cameras": _example_cameras(), "frames": frames}
        write_bytes(partial / FRAMES_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _example_cameras() -> dict[str, dict]:
    """nuScenes' cameras, at the size of the example's images, with the LiDAR as the vehicle's frame."""
    cameras = {}
    for camera in CAMERAS:
        camera2ego = np.eye(4)
        camera2ego[:3, :3] = Quaternion(camera.rotation).normalised.rotation_matrix
        camera2ego[:3, 3] = camera.translation
        ego2lidar = np.array([[0, -1, 0, 0], [1, 0, 0, -0.94], [0, 0, 1, -1.84], [0, 0, 0, 1.0]])
        cameras[camera.channel] = {
            "intrinsic": intrinsic_matrix(camera, EXAMPLE_SIZE).tolist(),
            "lidar2cam": np.linalg.inv(ego2lidar @ camera2ego).tolist(),
        }
    return cameras
