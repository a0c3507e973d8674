"""Pictures of one frame: the camera views with projected 3D boxes, beside a bird's-eye panel.

Detections are solid, in the colour of their class, with class and score; ground truth is thin, white and dashed, or
takes the part of the detections when there are none. The front face of a box is tinted, and a line on its floor points
ahead.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cmt_aqr.boxes import Detections, Targets, box_corners
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.errors import UserError
from cmt_aqr.viz import paint
from cmt_aqr.viz.bev_panel import ARROW_SECONDS, BevPanel
from cmt_aqr.viz.paint import CLASS_COLOURS, Colour, Text

TILE_HEIGHT = 360
GAP = 6
TITLE_HEIGHT = 40
# Metres in front of a camera where boxes are cut off.
NEAR = 0.2
# Metres from the LiDAR to the border of the bird's-eye panel.
REACH = 54.0

_LAYOUT = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
_COLUMNS = 3
_EDGES = np.array([
    (0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7),
])  # fmt: skip
_FRONT_FACE = [1, 2, 6, 5]
# Boxes lower than this in a view get no label: there would be more text than picture.
_MIN_LABELLED = 14


class PictureError(UserError):
    """A picture that cannot be written; one sentence with the file."""


def draw_detections(
    images: ArrayLike | Tensor | None,
    points: ArrayLike | Tensor | None,
    lidar2img: ArrayLike | Tensor | None,
    *,
    detections: Detections | None = None,
    targets: Targets | None = None,
    score_threshold: float = 0.3,
    title: str = "",
    cameras: Sequence[str] = CAMERAS,
) -> np.ndarray:
    """Draw one frame.

    Args:
        images: (V, H, W, 3) uint8 RGB, or None without cameras.
        points: (P, >=3) metres, LiDAR frame, or None without LiDAR.
        lidar2img: (V, 4, 4) to pixels of ``images``; None without cameras.
        detections, targets: boxes in the LiDAR frame; either may be None.
        score_threshold: detections below are left out.
        title: written above.
        cameras: names of the V views.

    Returns:
        (height, width, 3) uint8 RGB. Every view is scaled to a height of 360 pixels.

    Raises:
        ValueError: shapes that do not fit.
    """
    groups = _box_groups(detections, targets, score_threshold)
    views = [] if images is None else _camera_tiles(_array(images), lidar2img, groups, cameras)
    grid = _grid(views)
    panel = _bev(None if points is None else _array(points), groups, 920 if grid is None else grid.shape[0])
    body = panel if grid is None else np.concatenate((grid, _blank(grid.shape[0], GAP), panel), axis=1)
    counts = []
    if detections is not None:
        counts.append(f"{len(groups[-1].boxes)} detections, score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}")
    if targets is not None:
        counts.append(f"{len(targets.boxes)} ground truth")
    head = _title(title, ", ".join(counts), body.shape[1])
    return np.concatenate((head, body, _legend(body.shape[1], detections is not None and targets is not None)))


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


def project_box_edges(boxes: np.ndarray, lidar2img: np.ndarray, near: float = NEAR) -> tuple[np.ndarray, np.ndarray]:
    """Edges of boxes in one view, cut at a plane in front of the camera.

    Args:
        boxes: (N, 9), LiDAR frame.
        lidar2img: (4, 4) to pixels.
        near: metres from the camera to the plane.

    Returns:
        lines (M, 2, 2) in pixels, and the index (M,) of the box that each belongs to.
    """
    corners = _homogeneous_pixels(box_corners(torch.from_numpy(boxes)).numpy(), lidar2img)
    edges = corners[:, _EDGES].reshape(-1, 2, 3)
    owner = np.repeat(np.arange(len(boxes)), len(_EDGES))
    seen = (edges[..., 2] > near).any(axis=1)
    edges, owner = edges[seen], owner[seen]
    depth = edges[..., 2]
    step = depth[:, 1] - depth[:, 0]
    cut = (near - depth[:, 0]) / np.where(step == 0, 1, step)
    crossing = edges[:, 0] + cut[:, None] * (edges[:, 1] - edges[:, 0])
    edges = np.where((depth < near)[..., None], crossing[:, None], edges)
    return edges[..., :2] / edges[..., 2:], owner


class _Boxes:
    """Boxes (N, 9) float64 to draw in one manner, nearest last so that they cover what is behind them."""

    def __init__(self, boxes: Tensor, labels: Tensor, scores: Tensor | None, dashed: bool):
        order = torch.argsort(boxes[:, :2].norm(dim=1), descending=True, stable=True)
        self.boxes = boxes[order].double().numpy()
        self.dashed = dashed
        names = [CLASSES[label] for label in labels[order].tolist()]
        self.colours: list[Colour] = [paint.WHITE if dashed else CLASS_COLOURS[name] for name in names]
        self.scores = None if scores is None else scores[order].tolist()
        ends = [""] * len(names) if self.scores is None else [f" {score:.2f}" for score in self.scores]
        self.captions = [] if dashed else [name.replace("_", " ") + end for name, end in zip(names, ends, strict=True)]


def _box_groups(detections: Detections | None, targets: Targets | None, score_threshold: float) -> list[_Boxes]:
    """What to draw, in this order: ground truth lies under the detections."""
    groups = []
    if targets is not None:
        truth = targets.to("cpu")
        groups.append(_Boxes(truth.boxes, truth.labels, None, dashed=detections is not None))
    if detections is not None:
        found = detections.cpu()
        kept = found.scores >= score_threshold
        groups.append(_Boxes(found.boxes[kept].detach(), found.labels[kept], found.scores[kept].detach(), dashed=False))
    return groups


def _camera_tiles(
    images: np.ndarray, lidar2img: ArrayLike | Tensor | None, groups: list[_Boxes], cameras: Sequence[str]
) -> list[np.ndarray]:
    """Painted views in the order in which they are laid out."""
    matrices = np.zeros((0, 4, 4)) if lidar2img is None else _array(lidar2img).astype(np.float64)
    views = len(cameras)
    if images.ndim != 4 or images.shape[0] != views or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be ({views}, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if matrices.shape != (views, 4, 4):
        raise ValueError(f"lidar2img must be ({views}, 4, 4), got {matrices.shape}")
    order = [cameras.index(name) for name in _LAYOUT] if set(cameras) == set(_LAYOUT) else range(views)
    return [_camera_tile(images[i], matrices[i], groups, cameras[i]) for i in order]


def _camera_tile(image: np.ndarray, lidar2img: np.ndarray, groups: list[_Boxes], name: str) -> np.ndarray:
    """One view at the height of a tile."""
    height, width = image.shape[:2]
    zoom = TILE_HEIGHT / height
    size = (round(width * zoom), TILE_HEIGHT)
    tile = image.copy()
    if zoom != 1:
        tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Pixel centres are integers: (u + 0.5) zooms, not u.
    across, down = size[0] / width, size[1] / height
    scaling = np.array([[across, 0, across / 2 - 0.5], [0, down, down / 2 - 0.5], [0, 0, 1]])
    to_tile = np.eye(4)
    to_tile[:3] = scaling @ lidar2img[:3]
    labels: list[Text] = []
    for group in groups:
        labels += _draw_boxes(tile, group, to_tile)
    plate = Text(name.removeprefix("CAM_").replace("_", " "), 0, 0, paint.WHITE, paint.BACKGROUND, size=14, bold=True)
    paint.write_texts(tile, [*_without_overlap(labels, plate, tile.shape), plate])
    return tile


def _draw_boxes(tile: np.ndarray, group: _Boxes, lidar2img: np.ndarray) -> list[Text]:
    """Draw one group of boxes; returns the labels that it would like, the best first."""
    height, width = tile.shape[:2]
    lines, owner = project_box_edges(group.boxes, lidar2img)
    heading, heading_owner = _heading_lines(group.boxes, lidar2img)
    faces = _front_faces(group.boxes, lidar2img)
    wanted = []
    parts = []
    under = tile.copy()
    for i in range(len(group.boxes)):
        visible = paint.clip_lines(lines[owner == i], width, height)
        if not len(visible):
            continue
        extent = np.clip(visible.reshape(-1, 2), 0, (width - 1, height - 1))
        top, bottom = extent[:, 1].min(), extent[:, 1].max()
        strokes = np.concatenate((visible, paint.clip_lines(heading[heading_owner == i], width, height)))
        if group.dashed:
            strokes = paint.dashes(visible, *((6, 5) if bottom - top > 60 else (3, 3)))
        elif faces[i] is not None:
            paint.fill(under, faces[i], group.colours[i])
        paint.stroke(under, strokes, (0, 0, 0), 2 if group.dashed else 3)
        parts.append((strokes, group.colours[i], 1 if group.dashed or bottom - top < 60 else 2))
        if group.captions and bottom - top >= _MIN_LABELLED:
            rank = -(bottom - top) if group.scores is None else -group.scores[i]
            # Above the leftmost of the highest points, so that it touches the box.
            left = extent[extent[:, 1] < top + 2, 0].min()
            label = Text(group.captions[i], left, max(top - 17, 0), (0, 0, 0), group.colours[i], size=11)
            wanted.append((rank, label))
    cv2.addWeighted(under, 0.3, tile, 0.7, 0, dst=tile)
    for strokes, colour, thickness in parts:
        paint.stroke(tile, strokes, colour, thickness)
    return [label for _, label in sorted(wanted, key=lambda pair: pair[0])]


def _heading_lines(boxes: np.ndarray, lidar2img: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lines (M, 2, 2) on the floor of boxes from the middle to the front, and the index of their boxes (M,)."""
    floor = box_corners(torch.from_numpy(boxes)).numpy()[:, :4]
    ends = _homogeneous_pixels(np.stack((floor.mean(axis=1), floor[:, 1:3].mean(axis=1)), axis=1), lidar2img)
    seen = (ends[..., 2] > NEAR).all(axis=1)
    return ends[seen, :, :2] / ends[seen, :, 2:], np.flatnonzero(seen)


def _front_faces(boxes: np.ndarray, lidar2img: np.ndarray) -> list[np.ndarray | None]:
    """Pixels (4, 2) of every box's front face, None where it is not all in front of the camera."""
    face = _homogeneous_pixels(box_corners(torch.from_numpy(boxes)).numpy()[:, _FRONT_FACE], lidar2img)
    limit = 1e4  # pixels; cv2's fixed-point coordinates overflow far beyond
    pixels = [None if (f[:, 2] <= NEAR).any() else f[:, :2] / f[:, 2:] for f in face]
    return [None if p is None or np.abs(p).max() > limit else p for p in pixels]


def _homogeneous_pixels(points: np.ndarray, lidar2img: np.ndarray) -> np.ndarray:
    """(..., 3) metres -> (..., 3): u * depth, v * depth, depth."""
    return points @ lidar2img[:3, :3].T + lidar2img[:3, 3]


def _without_overlap(labels: list[Text], plate: Text, shape: tuple[int, ...]) -> list[Text]:
    """The labels that fit, first come first served, moved inside the image."""
    taken = [paint.text_box(plate)]
    kept = []
    for label in labels:
        left, _, right, _ = paint.text_box(label)
        label = label._replace(u=max(0, min(label.u, shape[1] - (right - left))))
        left, top, right, bottom = paint.text_box(label)
        if all(right <= a or left >= c or bottom <= b or top >= d for a, b, c, d in taken):
            taken.append((left, top, right, bottom))
            kept.append(label)
    return kept


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


def _bev(points: np.ndarray | None, groups: list[_Boxes], side: int) -> np.ndarray:
    panel = BevPanel(side, REACH)
    panel.draw_rings()
    if points is None:
        panel.note("no LiDAR points")
    else:
        panel.draw_points(points)
        panel.draw_height_bar()
        panel.note("point colour: height above the LiDAR")
    panel.note(f"arrow: motion in {ARROW_SECONDS:g} s", line=1)
    for group in groups:
        panel.draw_boxes(group.boxes, group.colours, dashed=group.dashed)
    panel.draw_ego()
    return panel.finish()


def _title(title: str, counts: str, width: int) -> np.ndarray:
    bar = _blank(TITLE_HEIGHT, width)
    right = Text(counts, width - 6, 10, paint.GREY, size=15, align="right")
    paint.write_texts(bar, [Text(title, 6, 8, size=18, bold=True), right])
    return bar


def _legend(width: int, has_both: bool) -> np.ndarray:
    """Classes and their colours, in as many lines as they need."""
    entries: list[tuple[str, Colour]] = [(name.replace("_", " "), CLASS_COLOURS[name]) for name in CLASSES]
    if has_both:
        entries.append(("ground truth", paint.WHITE))
    places, u, v = [], 10.0, 10
    for name, colour in entries:
        label = Text(name, u + 24, v - 2, size=14)
        right = paint.text_box(label)[2]
        if right > width:
            u, v = 10.0, v + 26
            label = label._replace(u=u + 24, v=v - 2)
            right = paint.text_box(label)[2]
        places.append((label, colour))
        u = right + 20
    bar = _blank(v + 26, width)
    for label, colour in places:
        left, middle = round(label.u) - 24, round(label.v) + 11
        if colour == paint.WHITE:
            paint.stroke(bar, paint.dashes(np.array([[[left, middle], [left + 20, middle]]], float), 5, 4), colour)
        else:
            paint.rectangle(bar, left, middle - 6, left + 20, middle + 6, colour)
    paint.write_texts(bar, [label for label, _ in places])
    return bar


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), paint.BACKGROUND, np.uint8)


def _array(values: ArrayLike | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
