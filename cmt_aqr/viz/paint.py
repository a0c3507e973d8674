"""Drawing primitives for the pictures: anti-aliased segments, dashes, translucent polygons, text.

Pixel coordinates are (u right, v down), integers at pixel centres. Pictures are uint8 RGB arrays (H, W, 3), painted in
place.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# One hue per class, told apart on photographs and on the dark background of the BEV panel.
CLASS_COLOURS: dict[str, Colour] = {
    "car": (255, 176, 0),
    "truck": (255, 94, 58),
    "construction_vehicle": (205, 150, 100),
    "bus": (255, 102, 196),
    "trailer": (179, 136, 255),
    "barrier": (158, 178, 194),
    "motorcycle": (0, 229, 255),
    "bicycle": (77, 157, 255),
    "pedestrian": (70, 226, 100),
    "traffic_cone": (236, 240, 75),
}
WHITE: Colour = (255, 255, 255)
GREY: Colour = (150, 156, 166)
BACKGROUND: Colour = (17, 19, 24)
# Colour of the frame and the words on a panel whose sensor failed.
FAILED: Colour = (255, 90, 60)

# cv2 draws with fixed-point coordinates: this many fractional bits.
_SHIFT = 4


class Text(NamedTuple):
    """A line of text; ``(u, v)`` is its upper left corner, or the upper right one when ``align`` is "right"."""

    text: str
    u: float
    v: float
    colour: Colour = WHITE
    ground: Colour | None = None
    size: int = 14
    bold: bool = False
    align: str = "left"


def clip_lines(lines: np.ndarray, width: int, height: int, margin: float = 8.0) -> np.ndarray:
    """The parts of segments inside an image (Liang and Barsky's method).

    Args:
        lines: (N, 2, 2) pixels, finite, of any size.
        width, height: pixels.
        margin: pixels around the image that are kept, so that a thick line ends outside.

    Returns:
        (M, 2, 2), M <= N.
    """
    start, step = lines[:, 0], lines[:, 1] - lines[:, 0]
    low = np.zeros(len(lines))
    high = np.ones(len(lines))
    for axis, size in ((0, width), (1, height)):
        for sign, bound in ((1, -margin), (-1, -(size - 1 + margin))):
            # Inside where distance + t * slope >= 0.
            distance = sign * start[:, axis] - bound
            slope = sign * step[:, axis]
            crossing = -distance / np.where(slope == 0, 1, slope)
            low = np.where(slope > 0, np.maximum(low, crossing), low)
            high = np.where(slope < 0, np.minimum(high, crossing), high)
            high = np.where((slope == 0) & (distance < 0), -1, high)
    kept = low < high
    ends = np.stack((low, high), axis=1)[kept]
    return start[kept][:, None] + ends[..., None] * step[kept][:, None]


def dashes(lines: np.ndarray, dash: float = 7.0, gap: float = 5.0) -> np.ndarray:
    """Segments (N, 2, 2) -> their dashes (M, 2, 2); lengths in pixels. Every segment starts and ends with a dash."""
    pieces = []
    for start, end in lines:
        length = float(np.hypot(*(end - start)))
        count = max(1, round((length + gap) / (dash + gap)))
        # Dashes and gaps keep their ratio and are stretched so that a whole number of them fits.
        period = 1 / (count - gap / (dash + gap))
        first = np.arange(count) * period
        last = np.minimum(first + period * dash / (dash + gap), 1)
        pieces.append(start + np.stack((first, last), axis=1)[..., None] * (end - start))
    return np.concatenate(pieces) if pieces else np.zeros((0, 2, 2))


def stroke(image: np.ndarray, lines: np.ndarray, colour: Colour, thickness: int = 1) -> None:
    """Draw segments (N, 2, 2); they must lie near the image (:func:`clip_lines`)."""
    fixed = np.round(lines * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(image, list(fixed[:, :, None]), False, colour, thickness, cv2.LINE_AA, _SHIFT)


def fill(image: np.ndarray, polygon: np.ndarray, colour: Colour) -> None:
    """Fill a convex polygon (N, 2)."""
    cv2.fillConvexPoly(image, np.round(polygon * (1 << _SHIFT)).astype(np.int32), colour, cv2.LINE_AA, _SHIFT)


def rectangle(image: np.ndarray, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
    """Fill an axis-parallel rectangle, borders included."""
    cv2.rectangle(image, (left, top), (right, bottom), colour, cv2.FILLED)


def frame(image: np.ndarray, colour: Colour, thickness: int = 6) -> None:
    """Paint a border inside an image."""
    for part in (image[:thickness], image[-thickness:], image[:, :thickness], image[:, -thickness:]):
        part[:] = colour


def failed_plate(name: str, failed: str) -> Text:
    """The name of a panel with what failed there, for its upper left corner."""
    return Text(f"{name}   FAILED: {failed}", 0, 0, (0, 0, 0), FAILED, size=21, bold=True)


def write_texts(image: np.ndarray, texts: Sequence[Text]) -> None:
    """Write lines of text, each on its own background when it has one."""
    if not texts:
        return
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    for text in texts:
        left, top, right, bottom = text_box(text)
        if text.ground is not None:
            pen.rectangle((left, top, right, bottom), fill=text.ground)
        pen.text((left + 3, top + 1), text.text, fill=text.colour, font=_font(text.size, text.bold))
    image[:] = np.asarray(canvas)


def text_box(text: Text) -> tuple[float, float, float, float]:
    """Left, top, right, bottom in pixels of a line of text with its background."""
    width = _font(text.size, text.bold).getlength(text.text) + 6
    left = text.u - width if text.align == "right" else text.u
    return left, text.v, left + width, text.v + round(1.25 * text.size) + 2


@lru_cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
