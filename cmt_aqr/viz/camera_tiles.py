"""Camera views with the boxes of a frame projected into them.

The front face of a box is tinted, and a line on its floor points ahead.
"""

import cv2
import numpy as np
import torch

from cmt_aqr.boxes import box_corners
from cmt_aqr.viz import paint
from cmt_aqr.viz.box_groups import BoxGroup
from cmt_aqr.viz.paint import Text

# Metres in front of a camera where boxes are cut off.
NEAR = 0.2
# Height of text in pixels: when a picture 2700 pixels wide is shown at 1600, 18 become 10.5.
CAPTION_SIZE, NAME_SIZE = 18, 21

_EDGES = np.array([
    (0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7),
])  # fmt: skip
_FRONT_FACE = [1, 2, 6, 5]
# Boxes lower than this in a view get no label: there would be more text than picture.
_MIN_LABELLED = 14


def camera_tile(
    image: np.ndarray,
    lidar2img: np.ndarray,
    groups: list[BoxGroup],
    name: str,
    *,
    width: int,
    failed: str | None = None,
) -> np.ndarray:
    """One view.

    Args:
        image: (H, W, 3) uint8 RGB.
        lidar2img: (4, 4) to its pixels.
        groups: in the order in which they are painted.
        name: of the camera, such as CAM_FRONT.
        width: of the tile, pixels.
        failed: what failed in this camera; the tile is framed.

    Returns:
        (height, width, 3) uint8.
    """
    zoom = width / image.shape[1]
    size = (width, max(1, round(image.shape[0] * zoom)))
    tile = image.copy()
    if zoom != 1:
        tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Pixel centres are integers, so it is u + 0.5 that scales with the size, not u.
    across, down = size[0] / image.shape[1], size[1] / image.shape[0]
    scaling = np.array([[across, 0, across / 2 - 0.5], [0, down, down / 2 - 0.5], [0, 0, 1]])
    to_tile = np.eye(4)
    to_tile[:3] = scaling @ lidar2img[:3]
    labels: list[Text] = []
    for group in groups:
        labels = _draw_boxes(tile, group, to_tile) + labels  # detections come last, their labels first
    title = name.removeprefix("CAM_").replace("_", " ")
    plate = Text(title, 0, 0, paint.WHITE, paint.BACKGROUND, NAME_SIZE, bold=True)
    if failed:
        plate = paint.failed_plate(title, failed)
        paint.frame(tile, paint.FAILED)
    paint.write_texts(tile, [*_without_overlap(labels, plate, tile.shape), plate])
    return tile


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


def _draw_boxes(tile: np.ndarray, group: BoxGroup, lidar2img: np.ndarray) -> list[Text]:
    """Draw one group of boxes; returns their labels, the most important first."""
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
        if group.is_dashed:
            strokes = paint.dashes(visible, *((6, 5) if bottom - top > 60 else (3, 3)))
        elif faces[i] is not None:
            paint.fill(under, faces[i], group.colours[i])
        paint.stroke(under, strokes, (0, 0, 0), 2 if group.is_dashed else 3)
        parts.append((strokes, group.colours[i], 1 if group.is_dashed or bottom - top < 60 else 2))
        if group.captions and group.captions[i] and bottom - top >= _MIN_LABELLED:
            rank = group.ranks[i] if group.ranks else top - bottom
            # Above the leftmost of the highest points, so that it touches the box.
            left = extent[extent[:, 1] < top + 2, 0].min()
            label = Text(group.captions[i], left, max(top - 26, 0), (0, 0, 0), group.colours[i], CAPTION_SIZE)
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
    """The labels that do not overlap an earlier one, moved inside the image."""
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
