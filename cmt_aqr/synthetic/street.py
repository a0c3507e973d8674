"""Filling a street: who stands and drives where. Everything is placed in road coordinates (s along, l to the left).

Nothing overlaps because every strip of the street has its own lateral range, things in a strip have gaps, and traffic
in one lane shares one speed profile. People crossing are the exception; they are tested against everybody else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from cmt_aqr.synthetic.clutter import building, clutter
from cmt_aqr.synthetic.objects import draw_shape, draw_size
from cmt_aqr.synthetic.road import Road
from cmt_aqr.synthetic.shapes import Shape

# Lateral centres (m) of the strips of each half of the street.
INNER_LANE, OUTER_LANE, BIKE_LANE, PARKING, VERGE = 1.85, 5.55, 8.05, 10.5, 12.5
WALKWAYS = (13.4, 14.3, 15.2)
STANDING, GREEN, BUILDINGS = 16.3, 17.6, 19.2
CONE_LINE = 8.87
CURB, SIDEWALK_END = 12.05, 16.9
LANE_EDGE, BIKE_EDGE = 7.4, 9.0

CROSSING_HALF_WIDTH = 3.0
CROSSING_REACH = 12.9
"""People crossing walk between -CROSSING_REACH and +CROSSING_REACH (m) and wait there."""

EGO_LATERAL = -INNER_LANE
EGO_GAP = 11.0
"""Nobody is placed in the ego's lane within this distance (m) of its centre at time 0."""

DRIFT = 4.0
"""The most (m) that a driver gains or loses on the lane's common profile over a scene."""

STILL = 0
"""Column of the speed profile of whatever does not move."""

_WORKS_LENGTH = 16.5
_HITCH = 1.1
_PARKING_DECKS = (
    ("car", "empty", "works", "car", "truck", "bus"),
    ("empty", "car", "works", "motorcycles", "car", "trailer"),
)
_LANE_DECK = (
    "car",
    "car",
    "car",
    "car",
    "truck",
    "bus",
    "car",
    "motorcycle",
    "articulated",
    "motorcycle",
    "car",
    "construction_vehicle",
)
_VERGE_DECK = ("pole", "bicycle", "bollard", "empty", "pillar", "sign", "empty", "bollard")
_GREEN_DECK = ("tree", "hedge", "empty", "bin", "tree", "wall", "empty", "hedge", "pillar", "empty")


@dataclass
class Actor:
    """One thing in the street; see Scene for how s, lateral and heading follow from these over time.

    label is a detection class or None for clutter. mode: "parked", "lane", "walk", "stand", "cross" or "static".
    """

    label: str | None
    shape: Shape
    s: float
    lateral: float
    turn: float = 0.0
    profile: int = STILL
    gain: float = 0.0
    lateral_speed: float = 0.0
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    has_rider: bool = False
    mode: str = "static"


@dataclass
class Street:
    """What fill_street needs to know: stretch (m) to fill, distance (m) driven on each profile, crossings, road."""

    start: float
    end: float
    travel: np.ndarray
    crossings: tuple[float, ...]
    road: Road
    rng: np.random.Generator
    actors: list[Actor] = field(default_factory=list)

    def add(self, label: str, s: float, lateral: float, *, size=None, **fields) -> Actor:
        """Place an object of a detection class."""
        has_rider = fields.get("has_rider", False)
        size = size or draw_size(label, self.rng, has_rider=has_rider)
        shape = draw_shape(label, size, self.rng, has_rider=has_rider, worker=fields.pop("worker", False))
        actor = Actor(label, shape, s, lateral, size=size, **fields)
        self.actors.append(actor)
        return actor

    def add_clutter(self, shape: Shape, s: float, lateral: float, turn: float) -> None:
        """Place something that is not annotated."""
        self.actors.append(Actor(None, shape, s, lateral, turn))

    def metre(self, start: float, end: float, lateral: float) -> float:
        """How much arc length a metre may take at a lateral offset between start and end: over 1 on an inner bend."""
        bend = self.road.curvature(np.linspace(start, end, 5)) * lateral
        return float(max(1.0, (1.0 / (1.0 - bend)).max()))

    def is_crossing(self, start: float, end: float) -> bool:
        """Whether the stretch start..end (m) reaches into a pedestrian crossing."""
        return any(start < at + CROSSING_HALF_WIDTH and end > at - CROSSING_HALF_WIDTH for at in self.crossings)


def fill_street(street: Street, lane_profiles: dict[float, int], walk_profiles: dict[float, int]) -> list[Actor]:
    """Every actor of a scene but the people crossing.

    lane_profiles: lateral centre -> speed profile of every driving and bicycle lane. walk_profiles: the same for the
    walkways, where the sign of the direction is drawn per walkway.
    """
    for side in (-1.0, 1.0):
        _fill_parking(street, side)
        _fill_verge(street, side)
        _fill_green(street, side)
        _fill_buildings(street, side)
        _fill_standing(street, side)
    for lateral, profile in lane_profiles.items():
        if abs(lateral) == BIKE_LANE:
            _fill_bike_lane(street, lateral, profile)
        else:
            _fill_lane(street, lateral, profile)
    for lateral, profile in walk_profiles.items():
        _fill_walkway(street, lateral, profile)
    return street.actors


def _deal(rng: np.random.Generator, *decks: tuple[str, ...]) -> Iterator[str]:
    """Cards of the decks in turn, each shuffled, without end: random, but every kind comes again soon."""
    for deck in cycle(decks):
        for index in rng.permutation(len(deck)):
            yield deck[index]


def _facing(side: float) -> float:
    """Turn (rad) that points along the traffic of one half of the street (right-hand traffic)."""
    return 0.0 if side < 0 else np.pi


_SLOT_LENGTHS = {"empty": 5.0, "works": _WORKS_LENGTH, "motorcycles": 4.5}


def _fill_parking(street: Street, side: float) -> None:
    rng, s = street.rng, street.start + street.rng.uniform(0, 5)
    for kind in _deal(rng, *_PARKING_DECKS):
        if s > street.end:
            return
        size = draw_size(kind, rng) if kind not in _SLOT_LENGTHS else None
        length = size[1] + rng.uniform(1.0, 2.0) if size else _SLOT_LENGTHS[kind]
        metre = street.metre(s, s + 1.2 * length, side * (PARKING + 1.5))
        length *= metre
        while street.is_crossing(s, s + length):
            s = next(at for at in street.crossings if at + CROSSING_HALF_WIDTH > s) + CROSSING_HALF_WIDTH
        if kind == "works":
            _add_works(street, side, s, metre)
        elif kind == "motorcycles":
            for k in range(int(rng.integers(2, 4))):
                turn = side * np.pi / 2 + rng.uniform(-0.15, 0.15)
                lateral = side * (PARKING + rng.uniform(-0.2, 0.2))
                street.add("motorcycle", s + (0.9 + 1.4 * k) * metre, lateral, turn=turn, mode="parked")
        elif size:
            street.add(
                kind,
                s + length / 2,
                side * (PARKING + rng.uniform(-0.04, 0.04)),
                size=size,
                turn=_facing(side) + rng.uniform(-0.01, 0.01),
                mode="parked",
            )
        s += length


def _add_works(street: Street, side: float, start: float, metre: float) -> None:
    """A works zone of _WORKS_LENGTH m from start (m) on: barriers, cones, a worker and one machine."""
    rng = street.rng

    def add(label: str, at: float, lateral: float, turn: float, **fields) -> None:
        street.add(label, start + at * metre, side * lateral, turn=turn, **fields)

    for at in (0.6, _WORKS_LENGTH - 0.6):
        add("barrier", at, PARKING + 0.2, rng.choice([0.0, np.pi]) + rng.uniform(-0.06, 0.06))
    for at in (2.7, 5.7):
        add(
            "barrier",
            at,
            PARKING - 0.8 + rng.uniform(-0.05, 0.05),
            rng.choice([-1, 1]) * np.pi / 2 + rng.uniform(-0.04, 0.04),
        )
    for at in (1.8, 5.4, 8.4, 11.2, 14.0):
        add("traffic_cone", at + rng.uniform(-0.3, 0.3), CONE_LINE, rng.uniform(-np.pi, np.pi))
    add("traffic_cone", 7.4, PARKING + 1.0, rng.uniform(-np.pi, np.pi))
    add("construction_vehicle", 11.8, PARKING + 0.15, rng.choice([0.0, np.pi]), mode="parked")
    if rng.random() < 0.7:
        add(
            "pedestrian",
            rng.uniform(2.5, 6.0),
            PARKING + rng.uniform(0.3, 1.0),
            rng.uniform(-np.pi, np.pi),
            mode="stand",
            worker=True,
        )


def _fill_verge(street: Street, side: float) -> None:
    rng, s = street.rng, street.start
    deck = _deal(rng, _VERGE_DECK)
    while s < street.end:
        kind = next(deck)
        if not street.is_crossing(s - 1.5, s + 1.5):
            if kind == "bicycle":
                street.add(
                    "bicycle", s, side * VERGE, turn=rng.choice([0.0, np.pi]) + rng.uniform(-0.05, 0.05), mode="parked"
                )
            elif kind != "empty":
                street.add_clutter(clutter(kind, rng), s, side * VERGE, _facing(-side) if kind == "pole" else 0.0)
        s += rng.uniform(2.6, 5.0)


def _fill_green(street: Street, side: float) -> None:
    rng, s = street.rng, street.start
    for kind in _deal(rng, _GREEN_DECK):
        if s > street.end:
            return
        if kind != "empty":
            street.add_clutter(clutter(kind, rng), s, side * GREEN, 0.0)
        s += rng.uniform(4.3, 8.0)


def _fill_buildings(street: Street, side: float) -> None:
    rng, s = street.rng, street.start
    while s < street.end:
        if rng.random() < 0.7:
            for _ in range(int(rng.integers(1, 4))):  # a row of houses
                length, depth = rng.uniform(7.0, 10.0), rng.uniform(6.0, 9.0)
                lateral = side * (BUILDINGS + rng.uniform(0.0, 0.5) + depth / 2)
                street.add_clutter(building(rng, length, depth), s + length / 2, lateral, np.pi if side < 0 else 0.0)
                s += length + 0.8
        s += rng.uniform(3.0, 14.0)


def _fill_standing(street: Street, side: float) -> None:
    rng, s = street.rng, street.start
    while s < street.end:
        street.add("pedestrian", s, side * STANDING, turn=rng.uniform(-np.pi, np.pi), mode="stand")
        s += 1.5 + rng.exponential(30.0)


def _reach(street: Street, profile: int, direction: float) -> tuple[float, float]:
    """Starting places (m) from which a mover passes through the filled stretch at some time of the scene."""
    travel = street.travel[profile] + DRIFT
    return (street.start - travel, street.end) if direction > 0 else (street.start, street.end + travel)


def _fill_lane(street: Street, lateral: float, profile: int) -> None:
    rng = street.rng
    direction = 1.0 if lateral < 0 else -1.0
    start, end = _reach(street, profile, direction)
    s = start + rng.uniform(0, 10)
    for kind in _deal(rng, _LANE_DECK):
        train = ("truck", "trailer") if kind == "articulated" else (kind,)
        has_rider = kind == "motorcycle"
        sizes = [draw_size(name, rng, has_rider=has_rider) for name in train]
        length = sum(size[1] for size in sizes) + _HITCH * (len(train) - 1)
        if s + length > end:
            return
        if lateral == EGO_LATERAL and s < EGO_GAP and s + length > -EGO_GAP:
            s = EGO_GAP + rng.uniform(0, 6)
            continue
        gain = direction * (1.0 + rng.uniform(-1, 1) * DRIFT / max(street.travel[profile], 2 * DRIFT))
        head = s + length if direction > 0 else s
        offset = lateral + rng.uniform(-0.1, 0.1)
        for name, size in zip(train, sizes, strict=True):
            street.add(
                name,
                head - direction * size[1] / 2,
                offset,
                size=size,
                turn=_facing(lateral),
                profile=profile,
                gain=gain,
                has_rider=has_rider,
                mode="lane",
            )
            head -= direction * (size[1] + _HITCH)
        s += length + 2.5 * DRIFT + rng.exponential(9.0)


def _fill_bike_lane(street: Street, lateral: float, profile: int) -> None:
    rng = street.rng
    direction = 1.0 if lateral < 0 else -1.0
    s, end = _reach(street, profile, direction)
    while s < end:
        s += 3.0 + 2 * DRIFT + rng.exponential(24.0)
        gain = direction * (1.0 + rng.uniform(-1, 1) * DRIFT / max(street.travel[profile], 2 * DRIFT))
        street.add(
            "bicycle",
            s,
            lateral + rng.uniform(-0.06, 0.06),
            turn=_facing(lateral),
            profile=profile,
            gain=gain,
            has_rider=True,
            mode="lane",
        )


def _fill_walkway(street: Street, lateral: float, profile: int) -> None:
    rng = street.rng
    direction = float(rng.choice([-1.0, 1.0]))
    s, end = _reach(street, profile, direction)
    while s < end:
        s += 1.6 + rng.exponential(34.0)
        street.add(
            "pedestrian", s, lateral, turn=0.0 if direction > 0 else np.pi, profile=profile, gain=direction, mode="walk"
        )
