"""A scene: one street, everything in it, and where all of it is at any time."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cmt_aqr.classes import CLASSES
from cmt_aqr.synthetic.conditions import Conditions, draw_conditions
from cmt_aqr.synthetic.road import Road, SpeedProfile, draw_profile, draw_road, side_by_side, still_profile
from cmt_aqr.synthetic.shapes import GROUND_CLEARANCE
from cmt_aqr.synthetic.street import (
    BIKE_LANE,
    CROSSING_REACH,
    EGO_LATERAL,
    INNER_LANE,
    OUTER_LANE,
    WALKWAYS,
    Street,
    fill_street,
)

KEYFRAME_INTERVAL = 0.5
"""Seconds between samples."""

VIEW_RANGE = 85.0
"""Objects whose centre is farther (m) from the ego are neither cast nor drawn."""

EGO_PROFILE = 1
"""Column of the ego's lane in Scene.profiles; column 0 stands still."""

NO_LABEL = -1
MOVING_SPEED = {"vehicle": 0.4, "pedestrian": 0.2}
"""Speeds (m/s) above which a vehicle or a person is annotated as moving."""

_EGO_SIZE = (1.8, 4.2, 1.6)
_EGO_CENTRE = 1.35
"""Centre of the ego's body in front of its origin (m)."""
_CROSSING_TRIES = 80
_CROSSING_WANTED = 5


@dataclass(frozen=True)
class Scene:
    """One street over time. N actors (labelled or clutter), P solid parts, Q painted quads, G draw groups.

    Actor n is at arc length s[n] + gain[n] * distance, where distance is column profile[n] of profiles.distance_at(t),
    and at lateral offset lateral[n] + lateral_speed[n] * t (held within +-CROSSING_REACH for people crossing), heading
    along the road plus turn[n].
    Arrays of length N: radius (m, on the ground, of all that is drawn), label (index of CLASSES or NO_LABEL), size
    (N, 3) width length height, has_rider, mode (see Actor). In the actor's frame, in metres, and otherwise as in
    Template: parts (P, 6), part_reflectivity; corners (Q, 4, 3), normals, colours, glow, is_decal, quad_group;
    group_centres (G, 2). part_actor, quad_actor, group_actor say whose they are; quad_group counts through the whole
    scene.
    """

    index: int
    conditions: Conditions
    road: Road
    profiles: SpeedProfile
    crossings: tuple[float, ...]
    radius: np.ndarray
    label: np.ndarray
    size: np.ndarray
    s: np.ndarray
    lateral: np.ndarray
    turn: np.ndarray
    profile: np.ndarray
    gain: np.ndarray
    lateral_speed: np.ndarray
    has_rider: np.ndarray
    mode: np.ndarray
    parts: np.ndarray
    part_actor: np.ndarray
    part_reflectivity: np.ndarray
    corners: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    glow: np.ndarray
    is_decal: np.ndarray
    quad_actor: np.ndarray
    quad_group: np.ndarray
    group_centres: np.ndarray
    group_actor: np.ndarray

    def ego_pose(self, time: float) -> tuple[float, float, float]:
        """Global x (m), y (m) and yaw (rad) of the ego's origin at a time (s from the first key frame)."""
        x, y, yaw = self.ego_poses(np.array([time]))[0].tolist()
        return x, y, yaw

    def ego_poses(self, times: np.ndarray) -> np.ndarray:
        """Poses (T, 3) of the ego at times (T,), as in ego_pose."""
        s = self.profiles.distance_at(times)[:, EGO_PROFILE]
        sway, wave = 0.25, 15.0
        lateral = EGO_LATERAL + sway * np.sin(s / wave)
        x, y, heading = self.road.place(s, lateral)
        slope = sway / wave * np.cos(s / wave) / (1.0 - self.road.curvature(s) * lateral)
        return np.stack([x, y, heading + np.arctan(slope)], axis=-1)

    def poses(self, times: np.ndarray, actors: np.ndarray) -> np.ndarray:
        """Where actors (n,) indices are at times (T,): (T, n, 3) global x (m), y (m), yaw (rad)."""
        poses = np.empty((len(times), len(actors), 3))
        poses[:] = self._first_poses[actors]
        moving = np.flatnonzero(self._moves[actors])
        poses[:, moving] = self._poses_on_track(times, actors[moving])
        return poses

    @cached_property
    def _moves(self) -> np.ndarray:
        """Which of all actors (N,) ever move: most never do."""
        return (self.gain != 0) | (self.lateral_speed != 0)

    @cached_property
    def _first_poses(self) -> np.ndarray:
        """Poses (N, 3) of all actors at time 0."""
        return self._poses_on_track(np.zeros(1), np.arange(len(self.s)))[0]

    def _poses_on_track(self, times: np.ndarray, actors: np.ndarray) -> np.ndarray:
        s, lateral, _ = self.track(times, actors)
        x, y, heading = self.road.place(s, lateral)
        return np.stack([x, y, heading + self.turn[actors]], axis=-1)

    def velocities(self, times: np.ndarray, actors: np.ndarray) -> np.ndarray:
        """Exact velocities (T, n, 2) in the global frame, m/s."""
        s, lateral, lateral_speed = self.track(times, actors)
        heading = self.road.heading(s)
        along = self.profiles.speed_at(times)[:, self.profile[actors]] * self.gain[actors]
        along = along * (1.0 - self.road.curvature(s) * lateral)
        vx = along * np.cos(heading) - lateral_speed * np.sin(heading)
        vy = along * np.sin(heading) + lateral_speed * np.cos(heading)
        return np.stack([vx, vy], axis=-1)

    def nearby(self, time: float) -> np.ndarray:
        """Indices (n,) of the actors within VIEW_RANGE of the ego."""
        x, y, _ = self.ego_pose(time)
        places = self.poses(np.array([time]), np.arange(len(self.s)))[0]
        return np.flatnonzero(np.hypot(places[:, 0] - x, places[:, 1] - y) < VIEW_RANGE)

    def attribute(self, actor: int, speed: float) -> str:
        """nuScenes attribute name of an actor at a speed (m/s), or "" for classes without attributes."""
        name = CLASSES[self.label[actor]]
        if name in ("barrier", "traffic_cone"):
            return ""
        if name in ("bicycle", "motorcycle"):
            return "cycle.with_rider" if self.has_rider[actor] else "cycle.without_rider"
        if name == "pedestrian":
            return "pedestrian.moving" if speed > MOVING_SPEED["pedestrian"] else "pedestrian.standing"
        if self.mode[actor] == "parked":
            return "vehicle.parked"
        return "vehicle.moving" if speed > MOVING_SPEED["vehicle"] else "vehicle.stopped"

    def centre_height(self, actor: int) -> float:
        """Height (m) of the centre of gravity of an actor's box above the ground."""
        return GROUND_CLEARANCE + float(self.size[actor, 2]) / 2

    def track(self, times: np.ndarray, actors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arc length (m), lateral offset (m) and its rate (m/s) of actors (n,) at times (T,): three (T, n) arrays."""
        distance = self.profiles.distance_at(times)
        s = self.s[actors] + distance[:, self.profile[actors]] * self.gain[actors]
        rate = self.lateral_speed[actors]
        free = self.lateral[actors] + rate * times[:, None]
        held = np.where(rate == 0, free, np.clip(free, -CROSSING_REACH, CROSSING_REACH))
        return s, held, np.where(free == held, rate, 0.0)


def build_scene(seed: int, index: int, samples: int, conditions: Conditions | None = None) -> Scene:
    """Scene number index of a world: a function of seed, index and the number of samples alone.

    conditions replaces the drawn ones (the street stays the same).
    """
    rng = np.random.default_rng([seed, index, 1])
    conditions = conditions or draw_conditions(seed, index)
    duration = KEYFRAME_INTERVAL * (samples - 1)
    lanes = (-INNER_LANE, -OUTER_LANE, INNER_LANE, OUTER_LANE, -BIKE_LANE, BIKE_LANE)
    walkways = tuple(side * at for side in (-1, 1) for at in WALKWAYS)
    drawn_profiles = [still_profile(duration), draw_profile(rng, duration, (4.0, 10.0), 0.35)]
    drawn_profiles += [draw_profile(rng, duration, (3.0, 11.0), 0.3) for _ in lanes[1:4]]
    drawn_profiles += [draw_profile(rng, duration, (3.0, 5.5), 0.0) for _ in lanes[4:]]
    drawn_profiles += [draw_profile(rng, duration, (0.8, 1.6), 0.0) for _ in walkways]
    profiles = side_by_side(drawn_profiles)
    travel = profiles.distance_at(np.array(duration))
    start, end = -VIEW_RANGE, travel[EGO_PROFILE] + VIEW_RANGE
    longest = travel.max() + 30.0
    road = draw_road(rng, start - longest, end + longest, tuple(rng.uniform(200.0, 1800.0, 2)))
    crossings = (float(rng.uniform(15.0, 40.0)), float(rng.uniform(-40.0, -15.0)), float(rng.uniform(60.0, 90.0)))
    street = Street(start, end, travel, tuple(sorted(crossings)), road, rng)
    fill_street(
        street,
        {lane: 1 + k for k, lane in enumerate(lanes)},
        {walkway: 1 + len(lanes) + k for k, walkway in enumerate(walkways)},
    )
    scene = _pack(index, conditions, road, profiles, street)
    _add_crossing_people(street, scene, duration)
    return _pack(index, conditions, road, profiles, street)


def _pack(index: int, conditions: Conditions, road: Road, profiles: SpeedProfile, street: Street) -> Scene:
    actors = street.actors
    templates = [actor.shape.template for actor in actors]
    scale = np.array([actor.shape.scale for actor in actors])
    bottom = np.array([actor.shape.bottom for actor in actors])
    paints = np.array([((0.0, 0.0, 0.0), *actor.shape.paints) for actor in actors])

    def column(name: str, dtype=np.float64) -> np.ndarray:
        return np.array([getattr(actor, name) for actor in actors], dtype=dtype)

    def joined(name: str) -> tuple[np.ndarray, np.ndarray]:
        """An array of every actor's template, end to end, and the owner of each row."""
        arrays = [getattr(template, name) for template in templates]
        return np.concatenate(arrays), np.repeat(np.arange(len(actors)), [len(array) for array in arrays])

    parts, part_actor = joined("parts")
    parts = parts * scale[part_actor][:, [0, 1, 0, 1, 2, 2]]
    parts[:, 4:] += bottom[part_actor, None]
    corners, quad_actor = joined("corners")
    corners = corners * scale[quad_actor, None]
    corners[..., 2] += bottom[quad_actor, None]
    radius = np.zeros(len(actors))
    np.maximum.at(radius, quad_actor, np.hypot(corners[..., 0], corners[..., 1]).max(1))
    group_centres, group_actor = joined("group_centres")
    first_group = np.searchsorted(group_actor, np.arange(len(actors)))
    paint = joined("paint")[0]
    return Scene(
        index=index,
        conditions=conditions,
        road=road,
        profiles=profiles,
        crossings=street.crossings,
        radius=radius,
        label=np.array([NO_LABEL if actor.label is None else CLASSES.index(actor.label) for actor in actors]),
        size=column("size"),
        s=column("s"),
        lateral=column("lateral"),
        turn=column("turn"),
        profile=column("profile", np.int64),
        gain=column("gain"),
        lateral_speed=column("lateral_speed"),
        has_rider=column("has_rider", bool),
        mode=column("mode", object),
        parts=parts,
        part_actor=part_actor,
        part_reflectivity=joined("reflectivity")[0],
        corners=corners,
        normals=joined("normals")[0],
        glow=joined("glow")[0],
        is_decal=joined("is_decal")[0],
        quad_actor=quad_actor,
        colours=np.where(paint[:, None] > 0, paints[quad_actor, paint], joined("colours")[0]),
        quad_group=joined("group")[0] + first_group[quad_actor],
        group_centres=group_centres * scale[group_actor, :2],
        group_actor=group_actor,
    )


def _add_crossing_people(street: Street, scene: Scene, duration: float) -> None:
    """People who cross the street where and when nothing comes near them."""
    rng = street.rng
    times = np.arange(-0.5, duration + 0.6, 0.1)
    ego = scene.ego_poses(times)
    ego[:, 0] += _EGO_CENTRE * np.cos(ego[:, 2])
    ego[:, 1] += _EGO_CENTRE * np.sin(ego[:, 2])
    paths = {at: _traffic_at(scene, times, at, ego) for at in street.crossings}
    taken: list[float] = []
    for _ in range(_CROSSING_TRIES):
        crossing = float(rng.choice(street.crossings))
        s = crossing + float(rng.uniform(-2.0, 2.0))
        side = float(rng.choice([-1.0, 1.0]))
        speed = -side * float(rng.uniform(1.0, 1.7))
        lateral = side * float(rng.uniform(0.0, CROSSING_REACH))
        path = np.clip(lateral + speed * times, -CROSSING_REACH, CROSSING_REACH)
        x, y, _ = scene.road.place(np.full_like(times, s), path)
        if all(abs(s - other) > 0.9 for other in taken) and _is_clear(x, y, *paths[crossing]):
            street.add("pedestrian", s, lateral, turn=np.sign(speed) * np.pi / 2, lateral_speed=speed, mode="cross")
            taken.append(s)
        if len(taken) == _CROSSING_WANTED:
            return


def _traffic_at(scene: Scene, times: np.ndarray, crossing: float, ego: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whatever comes near a crossing, and last the ego (T, 3): x, y, cosine and sine of yaw (4, T, n); half width and
    half length (2, n)."""
    labelled = np.flatnonzero(scene.label != NO_LABEL)
    s, _, _ = scene.track(times, labelled)
    near = labelled[(np.abs(s - crossing) < 14.0).any(0)]
    x, y, yaw = np.moveaxis(np.concatenate([scene.poses(times, near), ego[:, None]], axis=1), -1, 0)
    half = np.concatenate([scene.size[near, :2], [_EGO_SIZE[:2]]]).T / 2
    return np.stack([x, y, np.cos(yaw), np.sin(yaw)]), half


def _is_clear(x: np.ndarray, y: np.ndarray, places: np.ndarray, half: np.ndarray, margin: float = 0.5) -> bool:
    """Whether points x, y (T,) stay at least margin m (per axis) off the boxes of _traffic_at."""
    dx, dy = x[:, None] - places[0], y[:, None] - places[1]
    cos, sin = places[2:]
    along, across = np.abs(dx * cos + dy * sin), np.abs(dy * cos - dx * sin)
    return not np.any((along < half[1] + margin) & (across < half[0] + margin))
