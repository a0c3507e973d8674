"""Pictures of a failing sensor: a camera and the scene from above, before on the left and after on the right."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from cmt_aqr.viz import paint
from cmt_aqr.viz.bev_panel import BevPanel
from cmt_aqr.viz.camera_tiles import project_box_edges
from cmt_aqr.viz.paint import Text

GAP = 4
# Metres from the LiDAR to the border of the panel.
REACH = 36.0


def camera_panel(image: np.ndarray, boxes: Tensor | None, lidar2img: Tensor, *, width: int) -> np.ndarray:
    """One view (H, W, 3) at a width in pixels, with boxes (G, 9) drawn where the matrix (4, 4) puts them."""
    zoom = width / image.shape[1]
    panel = cv2.resize(image, (width, round(image.shape[0] * zoom)), interpolation=cv2.INTER_AREA)
    if boxes is not None:
        lines, _ = project_box_edges(boxes.double().numpy(), lidar2img.numpy())
        lines = paint.clip_lines(lines * zoom, panel.shape[1], panel.shape[0])
        paint.stroke(panel, lines, (0, 0, 0), 2)
        paint.stroke(panel, lines, paint.WHITE, 1)
    return panel


def bev_panel(points: np.ndarray, boxes: Tensor | None, *, width: int) -> np.ndarray:
    """Points (P, >= 3) and boxes (G, 9) seen from above, forward is up; the panel is two thirds as high as wide."""
    panel = BevPanel(width, REACH)
    panel.draw_rings()
    panel.draw_points(points[:, :3])
    if boxes is not None:
        still = torch.cat((boxes[:, :7], torch.zeros(len(boxes), 2)), dim=1)  # arrows would hide the points
        panel.draw_boxes(still.double().numpy(), [paint.WHITE] * len(boxes), dashed=True)
    panel.draw_ego()
    cut = width // 6
    return panel.finish()[cut : width - cut]


def side_by_side(rows: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> np.ndarray:
    """Rows of two panels of one size, labelled "before" and with the name of the row; (height, width, 3)."""
    lines = []
    for before, after, name in rows:
        for panel, words in ((before, "before"), (after, name)):
            paint.write_texts(panel, [Text(words, 0, 0, paint.WHITE, paint.BACKGROUND, size=12, bold=True)])
        gap = np.full((before.shape[0], GAP, 3), 255, np.uint8)
        lines.append(np.concatenate((before, gap, after), axis=1))
    width = max(line.shape[1] for line in lines)
    framed = []
    for line in lines:
        missing = width - line.shape[1]
        framed.append(np.pad(line, ((0, GAP), (0, missing), (0, 0)), constant_values=255))
    return np.concatenate(framed)[:-GAP]
