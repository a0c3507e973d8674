"""How things without a label look: houses, street furniture and plants."""

from functools import cache

import numpy as np

from cmt_aqr.synthetic.colours import RED, STEEL, WHITE
from cmt_aqr.synthetic.shapes import PAINT, SECOND_PAINT, SIDES, Shape, ShapeBuilder, Template

_PLASTER = np.array([[120, 150, 180], [150, 155, 160], [110, 120, 150], [170, 185, 195]])
_WINDOW = (95, 85, 75)
_STOREY = 3.2


def building(rng: np.random.Generator, length: float, depth: float) -> Shape:
    """A house of random height whose right side (-y) faces the street."""
    height = float(rng.uniform(4.5, 13.0))
    blue, green, red = (_PLASTER[int(rng.integers(len(_PLASTER)))] * rng.uniform(0.8, 1.1)).tolist()
    floors = int(height // _STOREY)
    template = _building_template(floors, tuple((rng.random(floors) < 0.4).tolist()))
    return Shape(template, (length, depth, height), 0.0, ((blue, green, red), WHITE))


@cache
def _building_template(floors: int, lit: tuple[bool, ...]) -> Template:
    windows = [
        ("right", (0.07 + 0.3 * k, 0.31 + 0.3 * k), ((i + 0.35) / floors, (i + 0.75) / floors), _WINDOW, lit[i])
        for i in range(floors)
        for k in range(3)
    ]
    builder = ShapeBuilder()
    builder.box((-0.5, 0.5), (-0.5, 0.5), (0.0, 1.0), PAINT, faces=("front", "back", "right"), decals=windows)
    return builder.build()


CLUTTER_KINDS = ("pole", "sign", "bollard", "pillar", "bin", "hedge", "wall", "tree")


def clutter(kind: str, rng: np.random.Generator) -> Shape:
    """Unlabelled street furniture of one of CLUTTER_KINDS, up to a tenth higher or lower than usual."""
    paint = [RED, (190.0, 90.0, 30.0), WHITE][int(rng.integers(3))]
    leaves = (40.0, float(rng.uniform(85, 130)), 55.0)
    return Shape(_clutter_template(kind), (1.0, 1.0, float(rng.uniform(0.9, 1.1))), 0.0, (paint, leaves))


@cache
def _clutter_template(kind: str) -> Template:
    """Sizes in metres."""
    builder = ShapeBuilder()
    if kind == "pole":
        builder.box((-0.08, 0.08), (-0.08, 0.08), (0.0, 5.5), (95, 100, 95), reflectivity=0.5, faces=SIDES)
        builder.box(
            (-0.15, 0.15),
            (-1.2, 0.1),
            (5.5, 5.65),
            (95, 100, 95),
            faces=(*SIDES, "bottom"),
            decals=[("bottom", (0.1, 0.9), (0.1, 0.9), (190, 240, 255), True)],
            reflectivity=None,
        )
    elif kind == "sign":
        builder.box((-0.05, 0.05), (-0.05, 0.05), (0.0, 2.1), STEEL, reflectivity=0.5, faces=SIDES)
        builder.box((-0.05, 0.05), (-0.35, 0.35), (2.1, 2.8), PAINT, reflectivity=0.95, faces=SIDES)
    elif kind == "bollard":  # as large as a cone, but grey
        builder.box((-0.14, 0.14), (-0.14, 0.14), (0.0, 0.95), (110, 110, 110))
    elif kind == "pillar":  # as large as a person, but one smooth block
        builder.box(
            (-0.25, 0.25),
            (-0.3, 0.3),
            (0.0, 1.8),
            (100, 140, 90),
            decals=[(side, (0.1, 0.9), (0.35, 0.9), (200, 215, 225), False) for side in SIDES],
        )
    elif kind == "bin":
        builder.box((-0.8, 0.8), (-0.5, 0.5), (0.0, 1.3), (60, 95, 40), reflectivity=0.35)
    elif kind == "hedge":
        builder.box((-2.0, 2.0), (-0.4, 0.4), (0.0, 1.2), (45, 110, 60), reflectivity=0.3)
    elif kind == "wall":
        builder.box((-2.0, 2.0), (-0.1, 0.1), (0.0, 1.9), (120, 130, 165), reflectivity=0.45)
    elif kind == "tree":
        builder.box((-0.15, 0.15), (-0.15, 0.15), (0.0, 2.6), (50, 70, 95), reflectivity=0.3, faces=SIDES)
        builder.box(
            (-1.1, 1.1), (-1.1, 1.1), (2.6, 4.2), SECOND_PAINT, reflectivity=0.25, faces=(*SIDES, "top", "bottom")
        )
        builder.box((-0.7, 0.7), (-0.7, 0.7), (4.2, 5.6), SECOND_PAINT, reflectivity=0.25, faces=SIDES)
    else:
        raise ValueError(f"unknown kind of clutter {kind!r}, expected one of {CLUTTER_KINDS}")
    return builder.build()
