"""The title above a picture and the legend below it."""

from typing import NamedTuple

import numpy as np

from cmt_aqr.classes import CLASSES
from cmt_aqr.viz import paint
from cmt_aqr.viz.box_groups import FALSE_ALARM, HIT, HIT_DISTANCE, MISSED, Style, trust_colours
from cmt_aqr.viz.paint import CLASS_COLOURS, GREY, WHITE, Colour, Text

TITLE_HEIGHT = 72
_SIZE = 21
_LINE = 34
_MARK = 26


class _Entry(NamedTuple):
    """A mark and its words; the mark is dashed, or filled with one colour or with several from left to right."""

    words: str
    colours: tuple[Colour, ...]
    is_dashed: bool = False


def title_bar(title: str, counts: str, width: int) -> np.ndarray:
    """The title, and below it how many boxes are drawn; (TITLE_HEIGHT, width, 3)."""
    bar = np.full((TITLE_HEIGHT, width, 3), paint.BACKGROUND, np.uint8)
    paint.write_texts(bar, [Text(title, 6, 4, size=25, bold=True), Text(counts, 6, 38, paint.GREY, size=21)])
    return bar


def legend(width: int, style: Style, has_both: bool) -> np.ndarray:
    """Colours and what they mean, in as many lines as they need.

    Args:
        width: pixels.
        has_both: whether ground truth is drawn beside detections.
    """
    places, u, v = [], 10.0, 8
    for entry in _entries(style, has_both):
        mark = _MARK * (5 if len(entry.colours) > 1 else 1)
        label = Text(entry.words, u + mark + 4, v - 2, size=_SIZE)
        if paint.text_box(label)[2] > width:
            u, v = 10.0, v + _LINE
            label = label._replace(u=u + mark + 4, v=v - 2)
        places.append((label, entry, mark))
        u = paint.text_box(label)[2] + 20
    bar = np.full((v + _LINE, width, 3), paint.BACKGROUND, np.uint8)
    for label, entry, mark in places:
        left, middle = round(label.u) - mark - 4, round(label.v) + 15
        if entry.is_dashed:
            line = np.array([[[left, middle], [left + mark, middle]]], float)
            paint.stroke(bar, paint.dashes(line, 6, 4), entry.colours[0], 2)
            continue
        step = mark / len(entry.colours)
        for i, colour in enumerate(entry.colours):
            paint.rectangle(
                bar, round(left + i * step), middle - 9, round(left + (i + 1) * step) - 1, middle + 9, colour
            )
    paint.write_texts(bar, [label for label, _, _ in places])
    return bar


def _entries(style: Style, has_both: bool) -> list[_Entry]:
    if style.colour_by == "outcome":
        return [
            _Entry(f"hit: an object of the class within {HIT_DISTANCE:g} m", (HIT,)),
            _Entry("false alarm", (FALSE_ALARM,)),
            _Entry("missed object", (MISSED,), is_dashed=True),
            _Entry("object that was hit", (WHITE,), is_dashed=True),
        ]
    if style.colour_by == "trust":
        differences = np.linspace(-1, 1, 26)
        scale = tuple(trust_colours(np.stack((differences, -differences), axis=1)))
        words = "(w_lidar - w_camera) / 2, from -1: trusts cameras, to 1: trusts LiDAR"
        entries = [_Entry(words, scale), _Entry("no window in one of them", (GREY,))]
    else:
        entries = [_Entry(name.replace("_", " "), (CLASS_COLOURS[name],)) for name in CLASSES]
    return entries + ([_Entry("ground truth", (WHITE,), is_dashed=True)] if has_both else [])
