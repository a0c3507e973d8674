"""Where single queries attend, with AQR's bias and without: from above and in a camera, with the queries' windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from cmt_aqr.viz import paint
from cmt_aqr.viz.bev_panel import BevPanel
from cmt_aqr.viz.box_groups import TRUST_CAMERA, TRUST_LIDAR
from cmt_aqr.viz.camera_tiles import project_box_edges
from cmt_aqr.viz.legend import title_bar
from cmt_aqr.viz.paint import Text

# Pixels of a panel; metres that a panel from above shows, and of the whole scene that it is cut from.
SIDE, VIEW_WIDTH = 480, 860
CROP, REACH = 24.0, 66.0
GAP = 6
_HEAD = 34
_LEGEND = (
    "windows: blue frame in the LiDAR's map, orange in a camera; colour: share of the attention in a cell, black to "
    "yellow by its square root, one scale for a row; white, dashed: the detection"
)


@dataclass(frozen=True)
class GridMap:
    """The attention of one query in one grid, mean over heads and layers.

    Attributes:
        plain: (rows, cols) share of the query's whole attention that each cell has, without the bias.
        biased: the same with the bias.
        window: first row and column, end row and column (exclusive); None without a window.
    """

    plain: np.ndarray
    biased: np.ndarray
    window: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class QueryMap:
    """One query: caption, box (9), the map of the BEV grid with its origin and cells in metres, and that of a camera.

    Attributes:
        view: number of the camera that has the window; without a window, of the one with the most attention.
    """

    caption: str
    box: np.ndarray
    bev: GridMap
    origin: tuple[float, float]
    cell_size: tuple[float, float]
    camera: GridMap
    view: int


def draw_queries(
    maps: Sequence[QueryMap], images: Tensor, points: Tensor, lidar2img: Tensor, title: str, cameras: Sequence[str]
) -> np.ndarray:
    """Four panels for every query: from above without and with the bias, and the camera without and with.

    Args:
        images: (V, H, W, 3) uint8 RGB.
        points: (P, >=3) metres.
        lidar2img: (V, 4, 4) to pixels of the images.
        cameras: names of the views.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    rows = []
    width = 2 * SIDE + 2 * VIEW_WIDTH + 3 * GAP
    for one in maps:
        top = max(float(part.max()) for grid in (one.bev, one.camera) for part in (grid.plain, grid.biased))
        name = cameras[one.view].removeprefix("CAM_").replace("_", " ")
        views = [_view(one, part, top, images, lidar2img) for part in (one.camera.plain, one.camera.biased)]
        panels = [_scene(one, part, top, points.numpy()) for part in (one.bev.plain, one.bev.biased)] + views
        for panel, words in zip(panels, ("from above", "from above", name, name), strict=True):
            is_biased = panel is panels[1] or panel is panels[3]
            plate = f"{words}, {'with' if is_biased else 'without'} the bias"
            paint.write_texts(panel, [Text(plate, 0, 0, paint.WHITE, paint.BACKGROUND, size=20, bold=True)])
        body = np.full((SIDE, width, 3), paint.BACKGROUND, np.uint8)
        left = 0
        for panel in panels:
            body[: panel.shape[0], left : left + panel.shape[1]] = panel
            left += panel.shape[1] + GAP
        head = np.full((_HEAD, width, 3), paint.BACKGROUND, np.uint8)
        paint.write_texts(head, [Text(one.caption, 6, 4, size=20)])
        rows += [head, body]
    return np.concatenate((title_bar(title, _LEGEND, width), *rows))


def heat(shares: np.ndarray, top: float) -> np.ndarray:
    """Shares (...,) of attention -> RGB (..., 3) uint8, black at 0 to yellow at ``top``, by the square root."""
    level = np.round(255 * np.sqrt(np.clip(shares / max(top, 1e-12), 0, 1))).astype(np.uint8)
    return cv2.applyColorMap(level.reshape(-1, 1), cv2.COLORMAP_INFERNO)[:, 0, ::-1].reshape(*shares.shape, 3)


def _scene(one: QueryMap, shares: np.ndarray, top: float, points: np.ndarray) -> np.ndarray:
    """The cells of the BEV map around the box, with points, box and window; forward is up."""
    panel = BevPanel(round(2 * REACH * SIDE / CROP), REACH)
    rows, cols = shares.shape
    (left, low), (width, height) = one.origin, one.cell_size
    corners = panel.pixels(np.array([[left, low + rows * height], [left + cols * width, low]])) + 0.5
    (u0, v0), (u1, v1) = np.round(corners).astype(int)
    # Row 0 of the map is the lowest y, which lies at the bottom of the picture.
    cells = cv2.resize(heat(shares[::-1], top), (u1 - u0, v1 - v0), interpolation=cv2.INTER_NEAREST)
    panel.image[v0:v1, u0:u1] = cells
    us, vs = np.floor(panel.pixels(points[:, :2]) + 0.5).astype(int).T
    shown = (us >= 0) & (us < panel.side) & (vs >= 0) & (vs < panel.side)
    panel.image[vs[shown], us[shown]] = (150, 156, 166)
    panel.draw_boxes(one.box[None], [paint.WHITE], dashed=True)
    if one.bev.window is not None:
        row, col, row_end, col_end = one.bev.window
        outline = np.array([(col, row), (col_end, row), (col_end, row_end), (col, row_end)], float)
        ring = panel.pixels(outline * one.cell_size + one.origin)
        paint.stroke(panel.image, np.stack((ring, np.roll(ring, -1, axis=0)), axis=1), TRUST_LIDAR, 3)
    centre = panel.pixels(one.box[:2])
    u, v = np.clip(np.round(centre - SIDE / 2).astype(int), 0, panel.side - SIDE)
    return panel.image[v : v + SIDE, u : u + SIDE].copy()


def _view(one: QueryMap, shares: np.ndarray, top: float, images: Tensor, lidar2img: Tensor) -> np.ndarray:
    """The camera's image with its cells painted over it, the box and the window."""
    image = images[one.view].numpy()
    zoom = min(VIEW_WIDTH / image.shape[1], SIDE / image.shape[0])
    size = (round(image.shape[1] * zoom), round(image.shape[0] * zoom))
    panel = cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC) // 2
    colours = heat(shares, top)
    panel = np.maximum(panel, cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST))
    lines, _ = project_box_edges(one.box[None], lidar2img[one.view].double().numpy())
    lines = paint.clip_lines(lines * zoom, *size)
    paint.stroke(panel, paint.dashes(lines, 6, 4), paint.WHITE, 1)
    if one.camera.window is not None:
        row, col, row_end, col_end = one.camera.window
        across, down = size[0] / shares.shape[1], size[1] / shares.shape[0]
        ring = np.array([(col, row), (col_end, row), (col_end, row_end), (col, row_end)], float) * (across, down) - 0.5
        ring = np.clip(ring, 1, np.array(size) - 2)
        paint.stroke(panel, np.stack((ring, np.roll(ring, -1, axis=0)), axis=1), TRUST_CAMERA, 3)
    return panel
