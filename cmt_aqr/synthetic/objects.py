"""How objects of the ten classes look: sizes, colours and shapes."""

from functools import cache

import numpy as np

from cmt_aqr.classes import CLASSES
from cmt_aqr.synthetic.colours import BLACK, GLASS, LAMP, ORANGE, RED, SKIN, STEEL, TAIL, TYRE, WHITE, YELLOW
from cmt_aqr.synthetic.shapes import PAINT, SECOND_PAINT, SIDES, Colour, Shape, ShapeBuilder, Template, fitted

# Mean and spread of width, length, height (m), near the statistics of nuScenes; barriers are wide and not long there.
_SIZES = {
    "car": ((1.95, 4.62, 1.70), (0.10, 0.35, 0.10)),
    "truck": ((2.50, 7.20, 2.95), (0.15, 0.90, 0.30)),
    "construction_vehicle": ((2.60, 6.37, 3.10), (0.06, 0.45, 0.25)),
    "bus": ((2.92, 11.0, 3.47), (0.04, 0.70, 0.15)),
    "trailer": ((2.85, 11.6, 3.85), (0.06, 0.90, 0.12)),
    "barrier": ((2.50, 0.52, 1.00), (0.06, 0.04, 0.06)),
    "motorcycle": ((0.78, 2.11, 1.30), (0.05, 0.12, 0.08)),
    "bicycle": ((0.60, 1.72, 1.15), (0.04, 0.08, 0.06)),
    "pedestrian": ((0.67, 0.72, 1.75), (0.05, 0.07, 0.10)),
    "traffic_cone": ((0.42, 0.42, 1.00), (0.03, 0.03, 0.12)),
}
_RIDER_HEIGHT = 0.45
"""What a rider adds to the height (m) of a cycle's box; nuScenes boxes include the rider."""

CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
"""nuScenes category of each detection class."""

_PAINTS = {
    "car": [(40, 40, 45), (225, 225, 225), (165, 165, 165), (60, 45, 150), (130, 70, 35), (95, 95, 95), (70, 90, 60)],
    "truck": [(200, 120, 50), (60, 60, 190), (205, 205, 205), (70, 130, 60)],
    "bus": [(70, 175, 60), (50, 150, 235), (190, 60, 45)],
    "trailer": [(200, 205, 210), (175, 165, 150), (150, 140, 190)],
    "motorcycle": [(35, 35, 190), (40, 40, 40), (170, 60, 40)],
    "bicycle": [(200, 150, 30), (60, 170, 190), (160, 50, 150)],
    "pedestrian": [(160, 60, 50), (50, 60, 170), (70, 130, 60), (190, 190, 190), (60, 50, 60), (60, 190, 220)],
    "legs": [(100, 60, 40), (50, 50, 50), (80, 100, 120)],
}


def draw_size(name: str, rng: np.random.Generator, *, has_rider: bool = False) -> tuple[float, float, float]:
    """A random width, length, height (m) of a class, in whole millimetres."""
    width, length, height = (
        mean + min(max(deviation, -2.0), 2.0) * spread
        for mean, spread, deviation in zip(*_SIZES[name], rng.standard_normal(3).tolist(), strict=True)
    )
    if has_rider:
        height += _RIDER_HEIGHT
    return round(width, 3), round(length, 3), round(height, 3)


def draw_shape(
    name: str,
    size: tuple[float, float, float],
    rng: np.random.Generator,
    *,
    has_rider: bool = False,
    worker: bool = False,
) -> Shape:
    """The shape of one object of a detection class with a random paint. worker: a pedestrian in a safety vest."""
    paint = _pick(name, rng) if name in _PAINTS else WHITE
    second = _pick("legs" if name == "pedestrian" else "pedestrian", rng)
    if worker:
        paint = ORANGE
    return fitted(_class_template(name, has_rider, worker), size, (paint, second))


@cache
def _class_template(name: str, has_rider: bool, worker: bool) -> Template:
    builder = ShapeBuilder()
    if name == "pedestrian":
        _pedestrian(builder, worker)
    elif name in ("motorcycle", "bicycle"):
        (_motorcycle if name == "motorcycle" else _bicycle)(builder, has_rider)
    else:
        _MAKERS[name](builder)
    return builder.build()


def _pick(palette: str, rng: np.random.Generator) -> Colour:
    base = _PAINTS[palette][int(rng.integers(len(_PAINTS[palette])))]
    brightness, shifts = rng.uniform(0.85, 1.1), rng.uniform(-10, 10, 3).tolist()
    blue, green, red = (
        min(max(value * brightness + shift, 5.0), 250.0) for value, shift in zip(base, shifts, strict=True)
    )
    return blue, green, red


def _wheels(*centres: float, radius: float = 0.09, top: float = 0.35) -> list:
    return [
        (side, (0.5 + sign * centre - radius, 0.5 + sign * centre + radius), (0.0, top), TYRE, False)
        for centre in centres
        for side, sign in (("right", 1), ("left", -1))
    ]


def _lamps(low: float, high: float) -> list:
    front = [("front", u, (low, high), LAMP, True) for u in ((0.04, 0.22), (0.78, 0.96))]
    return front + [("back", u, (low, high), TAIL, True) for u in ((0.04, 0.2), (0.8, 0.96))]


def _car(builder: ShapeBuilder) -> None:
    plate = [("back", (0.36, 0.64), (0.3, 0.48), WHITE, False), ("front", (0.25, 0.75), (0.25, 0.5), BLACK, False)]
    builder.box(
        (-0.5, 0.5),
        (-0.5, 0.5),
        (0.08, 0.56),
        PAINT,
        reflectivity=0.45,
        decals=[*_wheels(0.32, -0.32, top=0.5), *_lamps(0.55, 0.8), *plate],
    )
    builder.box(
        (-0.44, 0.2),
        (-0.44, 0.44),
        (0.56, 1.0),
        PAINT,
        reflectivity=0.3,
        decals=[(side, (0.06, 0.94), (0.12, 0.85), GLASS, False) for side in SIDES],
    )


def _truck(builder: ShapeBuilder) -> None:
    wheels = _wheels(0.0, radius=0.16, top=0.9)
    builder.long_box(
        (-0.5, 0.2),
        (-0.5, 0.5),
        (0.24, 1.0),
        (215, 215, 220),
        sections=2,
        reflectivity=0.55,
        decals=[
            *[(side, (0.0, 1.0), (0.08, 0.22), PAINT, False) for side in ("left", "right")],
            ("back", (0.1, 0.9), (0.1, 0.9), (170, 170, 175), False),
            ("back", (0.49, 0.51), (0.1, 0.9), BLACK, False),
        ],
        below=[
            (0, (-0.48, -0.15), (-0.4, 0.4), (0.02, 0.24), BLACK, [*wheels, *_lamps(0.5, 0.8)]),
            (1, (-0.15, 0.24), (-0.4, 0.4), (0.02, 0.24), BLACK, wheels),
        ],
    )
    builder.box(
        (0.25, 0.5),
        (-0.47, 0.47),
        (0.06, 0.8),
        PAINT,
        reflectivity=0.45,
        new_group=True,
        decals=[
            ("front", (0.06, 0.94), (0.5, 0.9), GLASS, False),
            *_lamps(0.1, 0.22),
            *[(side, (0.25, 0.75), (0.5, 0.88), GLASS, False) for side in ("left", "right")],
            *_wheels(0.0, radius=0.28, top=0.3),
        ],
    )


def _bus(builder: ShapeBuilder) -> None:
    builder.long_box(
        (-0.5, 0.5),
        (-0.5, 0.5),
        (0.06, 1.0),
        PAINT,
        sections=4,
        reflectivity=0.45,
        decals=[
            *[(side, (0.03, 0.97), (0.42, 0.8), GLASS, False) for side in ("left", "right")],
            *[(side, (0.0, 1.0), (0.2, 0.26), WHITE, False) for side in ("left", "right")],
            *_wheels(0.0, radius=0.16, top=0.2),
            ("front", (0.04, 0.96), (0.3, 0.8), GLASS, False),
            ("front", (0.2, 0.8), (0.85, 0.96), YELLOW, True),
            ("back", (0.1, 0.9), (0.5, 0.85), GLASS, False),
            *_lamps(0.08, 0.16),
        ],
    )


def _trailer(builder: ShapeBuilder) -> None:
    builder.long_box(
        (-0.5, 0.5),
        (-0.5, 0.5),
        (0.28, 1.0),
        PAINT,
        sections=4,
        reflectivity=0.6,
        decals=[
            *[
                (side, u, (0.0, 1.0), (95, 90, 90), False)
                for side in ("left", "right")
                for u in ((0.0, 0.06), (0.48, 0.54))
            ],
            ("back", (0.0, 1.0), (0.0, 0.08), RED, False),
            *_lamps(0.02, 0.08),
            ("back", (0.48, 0.52), (0.1, 0.95), BLACK, False),
        ],
        below=[
            (0, (-0.45, -0.25), (-0.42, 0.42), (0.0, 0.26), TYRE, []),
            (3, (0.27, 0.31), (-0.38, 0.38), (0.0, 0.28), STEEL, []),
        ],
    )


def _construction_vehicle(builder: ShapeBuilder) -> None:
    builder.box(
        (-0.42, 0.18),
        (-0.5, 0.5),
        (0.0, 0.24),
        TYRE,
        reflectivity=0.2,
        decals=[(side, (0.08, 0.92), (0.25, 0.75), (75, 75, 80), False) for side in ("left", "right")],
    )
    builder.box(
        (-0.5, 0.16),
        (-0.46, 0.46),
        (0.28, 0.58),
        YELLOW,
        reflectivity=0.5,
        decals=[
            ("back", (0.0, 1.0), (0.0, 0.3), BLACK, False),
            *[(side, (0.2, 0.5), (0.2, 0.8), BLACK, False) for side in ("left", "right")],
        ],
    )
    builder.box(
        (-0.16, 0.16),
        (0.02, 0.46),
        (0.58, 0.9),
        YELLOW,
        reflectivity=0.35,
        decals=[(side, (0.1, 0.9), (0.2, 0.9), GLASS, False) for side in SIDES],
    )
    builder.box((0.05, 0.36), (-0.24, -0.06), (0.6, 1.0), YELLOW, reflectivity=0.5, new_group=True)
    builder.box((0.36, 0.44), (-0.22, -0.08), (0.25, 0.95), (35, 160, 215), reflectivity=0.5, new_group=True)
    builder.box((0.34, 0.5), (-0.4, 0.1), (0.0, 0.25), (60, 60, 65), reflectivity=0.4)


def _barrier(builder: ShapeBuilder) -> None:
    stripes = [
        (side, (u, u + 0.125), (0.0, 1.0), RED, False) for side in ("front", "back") for u in (0.0, 0.25, 0.5, 0.75)
    ]
    builder.box((-0.5, 0.5), (-0.5, 0.5), (0.0, 0.3), (190, 190, 190), reflectivity=0.5)
    builder.box((-0.28, 0.28), (-0.5, 0.5), (0.3, 1.0), PAINT, reflectivity=0.6, decals=stripes)


def _traffic_cone(builder: ShapeBuilder) -> None:
    builder.box((-0.5, 0.5), (-0.5, 0.5), (0.0, 0.1), BLACK, reflectivity=0.3)
    builder.box((-0.4, 0.4), (-0.4, 0.4), (0.1, 0.45), ORANGE, reflectivity=0.6)
    builder.box((-0.28, 0.28), (-0.28, 0.28), (0.45, 0.7), PAINT, reflectivity=0.95)
    builder.box((-0.16, 0.16), (-0.16, 0.16), (0.7, 1.0), ORANGE, reflectivity=0.6)


def _pedestrian(builder: ShapeBuilder, worker: bool) -> None:
    vest = [(side, (0.0, 1.0), (0.4, 0.55), (150, 255, 255), True) for side in SIDES] if worker else []
    builder.box((-0.3, 0.3), (-0.32, 0.32), (0.0, 0.48), SECOND_PAINT, reflectivity=0.3)
    builder.box((-0.32, 0.32), (-0.5, 0.5), (0.48, 0.86), PAINT, reflectivity=0.35, decals=vest)
    builder.box(
        (-0.2, 0.2),
        (-0.2, 0.2),
        (0.86, 1.0),
        SKIN if not worker else YELLOW,
        reflectivity=0.35,
        decals=[("back", (0.0, 1.0), (0.3, 1.0), (30, 40, 60), False)],
    )


def _motorcycle(builder: ShapeBuilder, has_rider: bool) -> None:
    top = 0.72 if has_rider else 1.0
    builder.box((-0.5, 0.5), (-0.2, 0.2), (0.0, 0.38 * top), TYRE, reflectivity=0.2)
    builder.box(
        (-0.42, 0.36), (-0.32, 0.32), (0.38 * top, 0.72 * top), PAINT, reflectivity=0.45, decals=_lamps(0.4, 0.9)
    )
    builder.box((0.2, 0.32), (-0.5, 0.5), (0.8 * top, top), STEEL, reflectivity=0.5)
    if has_rider:
        builder.box((-0.24, 0.08), (-0.42, 0.42), (0.52, 0.87), SECOND_PAINT, reflectivity=0.35)
        builder.box((-0.12, 0.04), (-0.2, 0.2), (0.87, 1.0), BLACK, reflectivity=0.4)


def _bicycle(builder: ShapeBuilder, has_rider: bool) -> None:
    top = 0.68 if has_rider else 1.0
    builder.box(
        (-0.5, -0.14),
        (-0.12, 0.12),
        (0.0, 0.6 * top),
        TYRE,
        reflectivity=0.25,
        decals=[(side, (0.2, 0.8), (0.2, 0.8), STEEL, False) for side in ("left", "right")],
    )
    builder.box(
        (0.14, 0.5),
        (-0.12, 0.12),
        (0.0, 0.6 * top),
        TYRE,
        reflectivity=0.25,
        decals=[(side, (0.2, 0.8), (0.2, 0.8), STEEL, False) for side in ("left", "right")],
    )
    builder.box((-0.25, 0.25), (-0.1, 0.1), (0.35 * top, 0.75 * top), PAINT, reflectivity=0.4)
    builder.box((0.2, 0.3), (-0.5, 0.5), (0.82 * top, top), PAINT, reflectivity=0.4)
    if has_rider:
        builder.box((-0.2, 0.12), (-0.4, 0.4), (0.52, 0.86), SECOND_PAINT, reflectivity=0.35)
        builder.box((-0.08, 0.1), (-0.2, 0.2), (0.86, 1.0), SKIN, reflectivity=0.35)


_MAKERS = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "barrier": _barrier,
    "traffic_cone": _traffic_cone,
}
assert {*_MAKERS, "pedestrian", "motorcycle", "bicycle"} == set(CLASSES) == set(CATEGORIES)
