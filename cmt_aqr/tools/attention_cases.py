"""Attention problems with the geometry of real frames, for benchmarks and tests: no data needed."""

import math

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.attention import Grid, QueryWindows, TokenLayout, WindowSettings, query_windows
from cmt_aqr.config_checks import CAMERA_STRIDE
from cmt_aqr.rotations import rotation_matrix
from cmt_aqr.synthetic import calibration

POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
NUM_QUERIES = 900  # learned queries; any more in a case are denoising queries
NUM_OBJECTS = 40  # that denoising queries gather around
SPREAD = 0.01  # standard deviation around an object, of the whole range
# By how much the samples of a batch are rotated against each other, radians.
TURN = 0.02
PUBLISHED = WindowSettings({"lidar": 5, "camera": 8})


def nuscenes_lidar2img(image_size: tuple[int, int]) -> Tensor:
    """LiDAR frame -> pixels (6, 4, 4) of nuScenes' cameras, resized to this width, cropped at the bottom.

    Args:
        image_size: height, width in pixels.
    """
    scale = image_size[1] / calibration.FULL_IMAGE_SIZE[0]
    lidar2ego = _pose(calibration.LIDAR_ROTATION, calibration.LIDAR_TRANSLATION)
    matrices = []
    for camera in calibration.CAMERAS:
        intrinsic = np.eye(4)
        intrinsic[:3, :3] = calibration.intrinsic_matrix(camera, calibration.FULL_IMAGE_SIZE)
        resize = np.diag([scale, scale, 1.0, 1.0])
        camera2ego = _pose(camera.rotation, camera.translation)
        matrices.append(resize @ intrinsic @ np.linalg.inv(camera2ego) @ lidar2ego)
    return torch.from_numpy(np.stack(matrices))


def fusion_layout(
    bev: tuple[int, int] | None,
    cameras: tuple[int, int, int] | None,
    *,
    cell_size: tuple[float, float] | None = None,
    point_range: tuple[float, ...] = POINT_RANGE,
) -> TokenLayout:
    """A BEV grid of rows and cols, then camera grids of views, rows and cols; None leaves one out.

    The BEV grid begins at the lower corner of the point range. ``cell_size`` is in metres along x, y; without it the
    grid fills the range.
    """
    grids = []
    if bev is not None:
        fills = tuple((point_range[i + 3] - point_range[i]) / bev[1 - i] for i in range(2))
        grids.append(Grid("lidar", 1, *bev, origin=point_range[:2], cell_size=cell_size or fills))
    if cameras is not None:
        grids.append(Grid("camera", *cameras))
    return TokenLayout(tuple(grids))


def make_windows(
    layout: TokenLayout,
    batch_size: int,
    num_queries: int,
    *,
    device: torch.device | str,
    num_clusters: int = 0,
    seed: int = 0,
    settings: WindowSettings = PUBLISHED,
) -> QueryWindows:
    """Windows of random reference points: 900 learned ones, and the others around 40 objects as denoising makes them.

    Every sample of the batch has its own calibration. Views beyond the six of nuScenes repeat them.

    Args:
        num_clusters: the learned points lie around this many places; 0: they are uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    num_learned = min(num_queries, NUM_QUERIES)
    learned = torch.rand(num_learned, 3, generator=generator)
    if num_clusters:
        places = torch.rand(num_clusters, 3, generator=generator)[torch.arange(num_learned) % num_clusters]
        learned = (places + SPREAD * torch.randn(num_learned, 3, generator=generator)).clamp(0, 1)
    learned = learned.expand(batch_size, -1, -1)
    objects = torch.rand(batch_size, NUM_OBJECTS, 3, generator=generator)
    repeats = math.ceil((num_queries - num_learned) / NUM_OBJECTS)
    noised = objects.repeat(1, repeats, 1)[:, : num_queries - num_learned]
    noised = (noised + SPREAD * torch.randn(noised.shape, generator=generator)).clamp(0, 1)
    points = torch.cat((noised, learned), dim=1).to(device)
    lidar2img, image_size = None, None
    for grid in layout.grids:
        if grid.name == "camera":
            image_size = (grid.rows * CAMERA_STRIDE, grid.cols * CAMERA_STRIDE)
            lidar2img = torch.stack([nuscenes_lidar2img(image_size) @ _turn(i * TURN) for i in range(batch_size)])
            lidar2img = lidar2img.repeat(1, math.ceil(grid.views / lidar2img.shape[1]), 1, 1)[:, : grid.views].to(
                device
            )
    return query_windows(
        points, lidar2img, layout=layout, point_range=POINT_RANGE, image_size=image_size, settings=settings
    )


def _pose(rotation: tuple[float, ...], translation: tuple[float, ...]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(rotation)
    pose[:3, 3] = translation
    return pose


def _turn(angle: float) -> Tensor:
    """Rotation (4, 4) about z."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[0, 0] = turn[1, 1] = math.cos(angle)
    turn[0, 1], turn[1, 0] = -math.sin(angle), math.sin(angle)
    return turn
