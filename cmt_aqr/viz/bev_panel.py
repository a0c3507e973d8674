"""Bird's-eye panel: points coloured by height, range rings, boxes with heading and velocity."""

import cv2
import numpy as np
import torch

from cmt_aqr.boxes import box_corners
from cmt_aqr.viz import paint
from cmt_aqr.viz.paint import Colour, Text

# Metres above the LiDAR between which the colour of a point changes.
HEIGHT_RANGE = (-3.0, 3.0)
RING_STEP = 10
# A velocity arrow is as long as the way of this many seconds; objects slower than this, in m/s, have none.
ARROW_SECONDS = 1.0
ARROW_MIN_SPEED = 0.5

_RING: Colour = (58, 62, 72)


class BevPanel:
    """A square panel of the LiDAR frame seen from above: y (forward) up, x right, the LiDAR in the middle."""

    def __init__(self, side: int, reach: float):
        """side: pixels; reach: metres from the middle to the border."""
        self.side = side
        self.reach = reach
        self.scale = side / (2 * reach)
        self.image = np.full((side, side, 3), paint.BACKGROUND, np.uint8)
        self.texts: list[Text] = []

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """(..., 2) metres -> (..., 2) pixels."""
        return (self.side - 1) / 2 + xy * (self.scale, -self.scale)

    def draw_rings(self) -> None:
        """Circles every ``RING_STEP`` metres with their radius."""
        centre = tuple(int(value * 16) for value in self.pixels(np.zeros(2)))
        for radius in range(RING_STEP, int(self.reach) + 1, RING_STEP):
            cv2.circle(self.image, centre, int(radius * self.scale * 16), _RING, 1, cv2.LINE_AA, 4)
            u, v = self.pixels(np.array([radius * 0.7071, radius * 0.7071]))
            self._write(f"{radius} m", u - 12, v - 9)

    def draw_points(self, points: np.ndarray) -> None:
        """Points (P, >=3) as squares of 2 x 2 pixels, since single pixels are too faint; the highest are on top."""
        points = points[np.argsort(points[:, 2], kind="stable")]
        cells = np.floor(self.pixels(points[:, :2]) + 0.5).astype(np.int64)
        colours = height_colours(points[:, 2])
        for shift in ((-1, -1), (-1, 0), (0, -1), (0, 0)):
            own = cells + np.array(shift)
            shown = ((own >= 0) & (own < self.side)).all(axis=1)
            self.image[own[shown, 1], own[shown, 0]] = colours[shown]

    def draw_ego(self) -> None:
        """An arrow head at the LiDAR that points in the direction of travel."""
        self._write("direction of travel: up", self.side / 2 + 105, 4, align="right")
        shape = np.array([[0, 2.2], [1.1, -1.6], [0, -0.8], [-1.1, -1.6]])
        for half in (shape[[0, 1, 2]], shape[[0, 2, 3]]):
            paint.fill(self.image, self.pixels(half), paint.WHITE)

    def draw_boxes(self, boxes: np.ndarray, colours: list[Colour], *, dashed: bool) -> None:
        """Outlines of boxes (N, 9), a line from the centre to the front, and the velocity; filled unless dashed."""
        corners = box_corners(torch.from_numpy(boxes)).numpy()[:, :4, :2]
        outline = self.pixels(corners)
        front = self.pixels(corners[:, 1:3].mean(axis=1))
        centre = self.pixels(boxes[:, :2])
        tip = self.pixels(boxes[:, :2] + ARROW_SECONDS * boxes[:, 7:9])
        if not dashed:
            ground = self.image.copy()
            for polygon, colour in zip(outline, colours, strict=True):
                paint.fill(ground, polygon, colour)
            cv2.addWeighted(ground, 0.35, self.image, 0.65, 0, dst=self.image)
        for i, colour in enumerate(colours):
            edges = np.stack((outline[i], np.roll(outline[i], -1, axis=0)), axis=1)
            lines = np.concatenate((edges, np.stack((centre[i], front[i]))[None]))
            lines = paint.clip_lines(lines, self.side, self.side)
            paint.stroke(self.image, paint.dashes(lines, 4, 3) if dashed else lines, colour)
            # False for an unknown velocity, which is NaN.
            if np.hypot(*boxes[i, 7:9]) > ARROW_MIN_SPEED:
                self._draw_arrow(front[i], front[i] + tip[i] - centre[i], colour)

    def draw_height_bar(self) -> None:
        """Colour scale of the points, in the lower left corner."""
        height, top, left = 120, self.side - 140, 14
        values = np.linspace(HEIGHT_RANGE[1], HEIGHT_RANGE[0], height)
        self.image[top : top + height, left : left + 14] = height_colours(values)[:, None]
        for value, v in (
            (HEIGHT_RANGE[1], top - 10),
            (0.0, top + height / 2 - 12),
            (HEIGHT_RANGE[0], top + height - 14),
        ):
            self._write(f"{value:+.0f} m" if value else "0 m", left + 16, v)

    def note(self, text: str, line: int = 0) -> None:
        """A remark in the lower right corner; line 0 is the lowest."""
        self._write(text, self.side - 6, self.side - 32 - 25 * line, align="right")

    def finish(self, failed: str | None = None) -> np.ndarray:
        """Write the texts, and what failed in the LiDAR if it did; returns the panel (side, side, 3)."""
        if failed:
            self.texts.append(paint.failed_plate("LiDAR", failed))
            paint.frame(self.image, paint.FAILED)
        paint.write_texts(self.image, self.texts)
        return self.image

    def _write(self, text: str, u: float, v: float, align: str = "left") -> None:
        self.texts.append(Text(text, u, v, paint.GREY, paint.BACKGROUND, size=18, align=align))

    def _draw_arrow(self, start: np.ndarray, end: np.ndarray, colour: Colour) -> None:
        along = (end - start) / max(float(np.hypot(*(end - start))), 1e-6)
        across = np.array([-along[1], along[0]])
        barbs = end - 5 * along + 3.5 * np.stack((across, -across))
        lines = np.stack((np.stack((start, end)), np.stack((barbs[0], end)), np.stack((barbs[1], end))))
        paint.stroke(self.image, paint.clip_lines(lines, self.side, self.side), colour)


def height_colours(height: np.ndarray) -> np.ndarray:
    """Metres above the LiDAR (N,) -> RGB (N, 3) uint8, blue low to yellow high."""
    low, high = HEIGHT_RANGE
    level = np.round(255 * np.clip((height - low) / (high - low), 0, 1)).astype(np.uint8)
    # The darkest fifth of the colour map could not be told from the background of the panel.
    table = cv2.applyColorMap(np.linspace(55, 255, 256).astype(np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
    return table[level, 0, ::-1]
