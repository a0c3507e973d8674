"""What a :class:`cmt_aqr.predictor.Predictor` returns for one frame."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cmt_aqr.attention import QueryWindows
from cmt_aqr.boxes import Detections
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.evaluation.submission import detections_to_submission
from cmt_aqr.viz.box_groups import Style
from cmt_aqr.viz.pictures import draw_detections, write_picture


@dataclass(frozen=True)
class Frame:
    """The input of the frame, for pictures and for windows in the user's own pixels.

    Attributes:
        views: six (H, W, 3) uint8 arrays or None each; None without cameras.
        lidar2img: (6, 4, 4) float64 to pixels of the views.
        to_network: (6, 4, 4) float64, pixels of the views -> pixels of the network's images.
        image_size: (height, width) of views that are missing.
        points: (P, 5), or None where they are missing.
    """

    views: list[np.ndarray | None] | None
    lidar2img: Tensor | None
    to_network: Tensor | None
    image_size: tuple[int, int] | None
    points: Tensor | None


@dataclass(frozen=True)
class Windows:
    """Where AQR looked to weigh the sensors, for the query behind every box.

    Attributes:
        bev: (N, 4) x_min, y_min, x_max, y_max in metres, LiDAR frame; NaN where the query has no such window.
        cameras: (N, W, 5) view, u_min, v_min, u_max, v_max in pixels of the images as given; view -1 and NaN where
            there is none; W is 1, or the number of views with ``camera_assignment: all``.
    """

    bev: Tensor
    cameras: Tensor


@dataclass(frozen=True)
class Result:
    """Detections of one frame, best first, on the CPU.

    Attributes:
        detections: boxes, scores and labels as one record.
        aqr_weights: (N, 2) weight of LiDAR and of the cameras for the query behind every box; None without AQR.
        windows: None without AQR.
        frame: what was given.
    """

    detections: Detections
    aqr_weights: Tensor | None
    windows: Windows | None
    frame: Frame

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def boxes(self) -> Tensor:
        """(N, 9) x, y, z, length, width, height, yaw, vx, vy: gravity centre, metres, radians, m/s, LiDAR frame."""
        return self.detections.boxes

    @property
    def scores(self) -> Tensor:
        """(N,) in [0, 1], descending."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """(N,) int64, index into ``cmt_aqr.classes.CLASSES``."""
        return self.detections.labels

    @cached_property
    def names(self) -> list[str]:
        """Class names of the N boxes."""
        return [CLASSES[label] for label in self.labels.tolist()]

    def to_nuscenes(self, sample_token: str, *, lidar2ego: ArrayLike, ego2global: ArrayLike) -> list[dict]:
        """Rows of the nuScenes detection submission, in the global frame.

        Args:
            sample_token: nuScenes sample token of the frame.
            lidar2ego, ego2global: (4, 4) rigid transforms at the LiDAR's time stamp.

        Raises:
            EvaluationError: a pose is no rigid transform.
        """
        poses = (np.asarray(pose, dtype=np.float64)[None] for pose in (lidar2ego, ego2global))
        return detections_to_submission([sample_token], [self.detections], *poses)[sample_token]

    def draw(self, path: str | Path, *, score_threshold: float = 0.3, title: str = "") -> Path:
        """Draw the boxes into the views and the scene from above, as a .jpg or .png file.

        Raises:
            PictureError: the file cannot be written.
        """
        views, matrices = _pictures_of(self.frame)
        picture = draw_detections(
            views,
            self.frame.points if self.frame.points is None else self.frame.points.cpu(),
            matrices,
            detections=self.detections,
            title=title,
            style=Style(score_threshold=score_threshold),
        )
        return write_picture(path, picture)


def _pictures_of(frame: Frame) -> tuple[np.ndarray | None, Tensor | None]:
    """The views as one array (6, H, W, 3) with their calibration; views of other sizes are stretched to the first."""
    if frame.views is None:
        return None, None
    height, width = next((view.shape[:2] for view in frame.views if view is not None), frame.image_size)
    images, matrices = np.zeros((len(CAMERAS), height, width, 3), dtype=np.uint8), frame.lidar2img.clone()
    for i, view in enumerate(frame.views):
        own = frame.image_size if view is None else view.shape[:2]
        if view is not None:
            images[i] = view if own == (height, width) else cv2.resize(view, (width, height))
        matrices[i, 0] *= width / own[1]
        matrices[i, 1] *= height / own[0]
    return images, matrices


def find_windows(
    windows: QueryWindows, sample: int, queries: Tensor, frame: Frame, network_size: tuple[int, int]
) -> Windows:
    """The windows of some queries in metres and in the user's pixels.

    Args:
        windows: of all queries of a batch.
        sample: number of the frame in it.
        queries: (N,) numbers of the queries.
        frame: what was given.
        network_size: (height, width) of the network's images.
    """
    bev = cameras = None
    for grid, cells in zip(windows.layout.grids, windows.cells, strict=True):
        own = cells[sample, queries].double().cpu()  # (N, W, 3) view, row, col
        radius = windows.settings.radius(grid)
        low, high = own[..., 1:] - radius, own[..., 1:] + radius + 1
        size = own.new_tensor((grid.rows, grid.cols))
        low, high = low.clamp(min=0), torch.minimum(high, size)
        if not windows.settings.is_local:
            low, high = torch.zeros_like(low), size.expand_as(high)
        edges = torch.cat((low.flip(-1), high.flip(-1)), dim=-1)  # col, row, col, row
        edges = edges.masked_fill(own[..., :1] < 0, torch.nan)
        if grid.cell_size is not None:
            scale, origin = own.new_tensor(grid.cell_size), own.new_tensor(grid.origin)
            bev = (edges * scale.repeat(2) + origin.repeat(2))[:, 0]
        else:
            cell = own.new_tensor((network_size[1] / grid.cols, network_size[0] / grid.rows)).repeat(2)
            view = own[..., 0].long()
            from_network = torch.linalg.inv(frame.to_network)[view.clamp(min=0)]
            scale = from_network[..., (0, 1), (0, 1)].repeat(1, 1, 2)
            shift = from_network[..., :2, 2].repeat(1, 1, 2)
            cameras = torch.cat((own[..., :1], edges * cell * scale + shift), dim=-1)
    return Windows(bev, cameras)
