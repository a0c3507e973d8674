"""Pictures of one frame: the camera views with projected 3D boxes, and the scene from above.

Detections are solid, with class and score; ground truth is thin and dashed, or solid when there are no detections.
Pictures are about 2700 pixels wide; their text is legible when they are shown at 1600.
"""

import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.errors import UserError
from cmt_aqr.viz import paint
from cmt_aqr.viz.bev_panel import ARROW_SECONDS, BevPanel
from cmt_aqr.viz.box_groups import BoxGroup, Style, choose_boxes
from cmt_aqr.viz.camera_tiles import camera_tile
from cmt_aqr.viz.legend import legend, title_bar

# Width of a view in pixels; in a tall picture, because two of those are shown side by side.
TILE_WIDTH, TALL_TILE_WIDTH = 640, 450
# The scene from above is at least this many pixels wide and high.
MIN_SIDE = 720
GAP = 6
# Metres from the LiDAR to the border of the bird's-eye panel.
REACH = 54.0

_LAYOUT = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
_COLUMNS = 3


class PictureError(UserError):
    """A picture that cannot be written; one sentence with the file."""


def draw_detections(
    images: ArrayLike | Tensor | None,
    points: ArrayLike | Tensor | None,
    lidar2img: ArrayLike | Tensor | None,
    *,
    detections: Detections | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
    title: str = "",
    style: Style = Style(),  # noqa: B008 - frozen
) -> np.ndarray:
    """Draw one frame.

    Args:
        images: (V, H, W, 3) uint8 RGB, or None without cameras.
        points: (P, >=3) metres, LiDAR frame, or None without LiDAR.
        lidar2img: (V, 4, 4) to pixels of ``images``; None without cameras.
        detections, targets: boxes in the LiDAR frame; either may be None.
        weights: (N, 2) of LiDAR and cameras for the detections, where colours show trust.
        title: written above.
        style: which boxes are drawn, and how.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ValueError: shapes that do not fit.
    """
    chosen = choose_boxes(detections, targets, weights, style)
    views = [] if images is None else _camera_tiles(_array(images), lidar2img, chosen.groups, style)
    grid = _grid(views)
    has_both = detections is not None and targets is not None
    points = None if points is None else _array(points)
    if grid is None or style.is_tall:
        width = _COLUMNS * TALL_TILE_WIDTH + 2 * GAP
        parts = [] if grid is None else [grid, _blank(GAP, width)]
        body = np.concatenate((*parts, _bev(points, chosen.groups, width, style), legend(width, style, has_both)))
    else:
        left = np.concatenate((grid, legend(grid.shape[1], style, has_both)))
        side = max(left.shape[0], MIN_SIDE)
        left = np.concatenate((left, _blank(side - left.shape[0], left.shape[1])))
        body = np.concatenate((left, _blank(side, GAP), _bev(points, chosen.groups, side, style)), axis=1)
    return np.concatenate((title_bar(title, chosen.counts, body.shape[1]), body))


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one frame beside each other, a white line between them."""
    height = max(left.shape[0], right.shape[0])
    left, right = (np.concatenate((part, _blank(height - part.shape[0], part.shape[1]))) for part in (left, right))
    line = np.full((height, 2, 3), 255, np.uint8)
    return np.concatenate((left, _blank(height, GAP), line, _blank(height, GAP), right), axis=1)


def write_picture(path: str | os.PathLike, picture: np.ndarray) -> Path:
    """Write an RGB picture (H, W, 3) as .png or .jpg (quality 92); its folder is made.

    Raises:
        PictureError: the file cannot be written.
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a picture must end in .png or .jpg")
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    data = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise PictureError(f"{path}: the picture cannot be written: {error.strerror}") from error
    return path


def _camera_tiles(
    images: np.ndarray, lidar2img: ArrayLike | Tensor | None, groups: list[BoxGroup], style: Style
) -> list[np.ndarray]:
    """Painted views in the order in which they are laid out."""
    matrices = np.zeros((0, 4, 4)) if lidar2img is None else _array(lidar2img).astype(np.float64)
    cameras, views = style.cameras, len(style.cameras)
    if images.ndim != 4 or images.shape[0] != views or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be ({views}, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if matrices.shape != (views, 4, 4):
        raise ValueError(f"lidar2img must be ({views}, 4, 4), got {matrices.shape}")
    order = [cameras.index(name) for name in _LAYOUT] if set(cameras) == set(_LAYOUT) else range(views)
    width = TALL_TILE_WIDTH if style.is_tall else TILE_WIDTH
    return [
        camera_tile(images[i], matrices[i], groups, cameras[i], width=width, failed=style.failed.get(cameras[i]))
        for i in order
    ]


def _grid(tiles: list[np.ndarray]) -> np.ndarray | None:
    """Tiles of one size in rows of three; None without tiles."""
    if not tiles:
        return None
    height, width = tiles[0].shape[:2]
    rows = []
    for first in range(0, len(tiles), _COLUMNS):
        row = tiles[first : first + _COLUMNS]
        row += [_blank(height, width)] * (min(_COLUMNS, len(tiles)) - len(row))
        parts = [part for tile in row for part in (tile, _blank(height, GAP))][:-1]
        rows += [np.concatenate(parts, axis=1), _blank(GAP, sum(part.shape[1] for part in parts))]
    return np.concatenate(rows[:-1])


def _bev(points: np.ndarray | None, groups: list[BoxGroup], side: int, style: Style) -> np.ndarray:
    panel = BevPanel(side, REACH)
    panel.draw_rings()
    if points is None:
        panel.note("no LiDAR points")
    else:
        panel.draw_points(points)
        panel.draw_height_bar()
        panel.note("points: height above the LiDAR")
    panel.note(f"arrows: motion in {ARROW_SECONDS:g} s", line=1)
    for group in groups:
        panel.draw_boxes(group.boxes, group.colours, dashed=group.is_dashed)
    panel.draw_ego()
    return panel.finish(style.failed.get("lidar"))


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), paint.BACKGROUND, np.uint8)


def _array(values: ArrayLike | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
