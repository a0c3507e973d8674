"""Frames as a ``.rrd`` file for the Rerun viewer: points, boxes and calibrated cameras in one scene, frame by frame.

The package rerun-sdk is an optional extra; only this module imports it. The scene is in the LiDAR frame, metres.
"""

import re
from pathlib import Path

import cv2
import numpy as np

from cmt_aqr.errors import UserError
from cmt_aqr.viz.bev_panel import height_colours
from cmt_aqr.viz.box_groups import BoxGroup, Style, choose_boxes
from cmt_aqr.viz.pictures import PictureError
from cmt_aqr.viz.shown_frame import ShownFrame

# Characters that have a meaning in the paths of Rerun.
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class MissingRerunError(UserError):
    """The optional package is not installed."""


class Recording:
    """A recording that is written frame by frame."""

    def __init__(self, path: Path):
        """Open the file.

        Raises:
            MissingRerunError: rerun-sdk is not installed.
            PictureError: the file has another suffix or cannot be written.
        """
        if path.suffix != ".rrd":
            raise PictureError(f"--rerun {path}: the name must end in .rrd")
        try:
            import rerun
        except ImportError as error:
            raise MissingRerunError(
                f"--rerun {path}: the package rerun-sdk cannot be imported ({error}): pip install -e '.[rerun]', "
                "or leave --rerun out"
            ) from None
        self._rerun = rerun
        self._path = path
        self._number = 0
        self._stream = rerun.RecordingStream("cmt_aqr")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")  # rerun reports a file that cannot be written later, and in several lines
        except OSError as error:
            raise PictureError(f"{path}: the recording cannot be written: {error.strerror}") from error
        self._stream.save(path)
        self._stream.log("scene", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)

    def add(self, frame: ShownFrame, style: Style) -> None:
        """Add a frame as the next step of the timeline."""
        rerun, stream = self._rerun, self._stream
        stream.set_time("frame", sequence=self._number)
        self._number += 1
        stream.log("title", rerun.TextDocument(frame.title))
        points = np.zeros((0, 3)) if frame.points is None else frame.points[:, :3].numpy()
        stream.log("scene/lidar", rerun.Points3D(points, colors=height_colours(points[:, 2]), radii=0.05))
        if frame.targets is not None:
            (truth,) = choose_boxes(None, frame.targets, None, Style(max_boxes=style.max_boxes)).groups
            self._log_boxes("scene/ground_truth", truth)
        for name, answer in frame.answers.items():
            targets = frame.targets if style.colour_by == "outcome" else None
            group = choose_boxes(answer.detections, targets, answer.weights, style).groups[-1]
            self._log_boxes(f"scene/{NOT_IN_A_NAME.sub('_', name)}", group)
        if frame.images is not None:
            for image, matrix, name in zip(frame.images.numpy(), frame.lidar2img.numpy(), style.cameras, strict=True):
                self._log_camera(f"scene/cameras/{name}", image, matrix)

    def finish(self) -> Path:
        """Write what is buffered and close the file; returns its path."""
        self._stream.flush()
        self._stream.disconnect()
        return self._path

    def _log_boxes(self, place: str, group: BoxGroup) -> None:
        yaw = group.boxes[:, 6] / 2
        quaternions = np.stack((0 * yaw, 0 * yaw, np.sin(yaw), np.cos(yaw)), axis=1)
        centers, halves = group.boxes[:, :3], group.boxes[:, 3:6] / 2
        boxes = self._rerun.Boxes3D(
            centers=centers, half_sizes=halves, quaternions=quaternions, colors=group.colours, labels=group.captions
        )
        self._stream.log(place, boxes)

    def _log_camera(self, place: str, image: np.ndarray, lidar2img: np.ndarray) -> None:
        rerun = self._rerun
        intrinsics, rotation, centre = split_projection(lidar2img)
        height, width = image.shape[:2]
        self._stream.log(place, rerun.Transform3D(translation=centre, mat3x3=rotation.T))
        self._stream.log(place, rerun.Pinhole(image_from_camera=intrinsics, width=width, height=height))
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        self._stream.log(place, rerun.EncodedImage(contents=data, media_type="image/jpeg"))


def split_projection(lidar2img: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intrinsics, rotation and position of a camera from its projection.

    Args:
        lidar2img: (4, 4), LiDAR frame to pixels times depth; its upper left 3 x 3 part is regular.

    Returns:
        intrinsics (3, 3), upper triangular with a positive diagonal and 1 in the corner; rotation (3, 3), LiDAR to
        camera frame; position (3,) of the camera in the LiDAR frame, metres.

    *Source*: RQ decomposition, Hartley and Zisserman, Multiple View Geometry, A4.1.
    """
    part = lidar2img[:3, :3].astype(np.float64)
    flip = np.eye(3)[::-1]
    orthogonal, upper = np.linalg.qr((flip @ part).T)
    intrinsics, rotation = flip @ upper.T @ flip, flip @ orthogonal.T
    signs = np.diag(np.sign(np.diag(intrinsics)))
    intrinsics, rotation = intrinsics @ signs, signs @ rotation
    centre = -np.linalg.solve(part, lidar2img[:3, 3].astype(np.float64))
    return intrinsics / intrinsics[2, 2], rotation, centre
