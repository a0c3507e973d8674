"""A 32-beam spinning LiDAR in rain, fog and clear air: what the cast rays return.

The geometry is in raycast.py; here are the ground, the ego's own body, losses, noise, ghosts and intensities.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cmt_aqr.synthetic.calibration import LIDAR_TRANSLATION
from cmt_aqr.synthetic.conditions import Conditions
from cmt_aqr.synthetic.raycast import BEAM_COS, BEAM_SLOPE, BEAMS, RayCaster, column_azimuth

HEIGHT = LIDAR_TRANSLATION[2]
"""Height (m) of the sensor above the ground."""

NOISE_LIMIT = 0.05
"""Range noise is clipped at this (m), below shapes.INSET, so that no object point ever leaves its annotation box."""

FROM_AIR = -1
"""Value of Scan.part for drops and fog in the air; the ground and the ego itself have lower ones."""

# Targets: what a ray may end on. The ground, one target per beam because a beam always meets level ground at the same
# distance; then the ego's body, the air, and the parts.
_EGO, _AIR, _FIRST_PART = BEAMS, BEAMS + 1, BEAMS + 2
_TARGET_MASK = (1 << 32) - 1

# Body and roof of the ego in the ego frame: x and y spans, top (m).
_EGO_BODY = (((-0.75, 3.45), (-0.88, 0.88), 0.95), ((-0.45, 2.05), (-0.72, 0.72), 1.52))

_GROUND_REFLECTIVITY = 0.12
_GHOST_RANGE = (2.0, 9.0)
_SPECKLE = (0.75, 1.25)
_GHOST_REFLECTIVITY = 0.05
_INTENSITY_SCALE, _FALL_OFF = 110.0, 60.0
_SHIFTS = 1024
"""The noise is fixed pictures, each shifted by one of so many columns from sweep to sweep."""

_NOTHING = 1e6
"""Distance (m) of the sky, from which nothing ever returns."""


@dataclass(frozen=True)
class _Weather:
    """reach (m): range at which a grey target returns half of the time; ground_reach likewise for the ground at
    grazing angles; noise (m) standard deviation; lost and ghost: shares of rays."""

    reach: float
    ground_reach: float
    noise: float
    lost: float
    ghost: float


_WEATHERS = {
    "clear": _Weather(reach=85.0, ground_reach=90.0, noise=0.012, lost=0.02, ghost=0.0),
    "rain": _Weather(reach=48.0, ground_reach=30.0, noise=0.02, lost=0.10, ghost=0.006),
    "fog": _Weather(reach=28.0, ground_reach=24.0, noise=0.02, lost=0.08, ghost=0.03),
}


@dataclass(frozen=True)
class Scan:
    """One sweep. points (n, 5) float32: x y z (m, sensor frame), intensity 0..255, ring.

    target (rays,): what each ray of the sweep ended on; kept (n,): the rays that returned.
    """

    points: np.ndarray
    target: np.ndarray
    kept: np.ndarray

    @property
    def part(self) -> np.ndarray:
        """What each point (n,) is from: an index into the parts that were cast, or FROM_AIR, or less for the ground and
        the ego itself. Worked out when asked for, because only key frames need it."""
        return self.target.take(self.kept) - _FIRST_PART


class Lidar:
    """The sensor in the conditions of one scene."""

    def __init__(self, columns: int, conditions: Conditions):
        self.columns = columns
        self._weather = _WEATHERS[conditions.weather]
        self._caster = RayCaster(columns, HEIGHT)
        self._cos_of_cell, self._sin_of_cell = np.repeat(self._caster.cos, BEAMS), np.repeat(self._caster.sin, BEAMS)
        self._slope_of_cell = np.tile(BEAM_SLOPE, columns)
        down = np.where(BEAM_SLOPE < 0, -1.0 / BEAM_SLOPE, _NOTHING)
        self._background = self._cast_background(down)
        self._ground_chance = self._return_chance(_GROUND_REFLECTIVITY, HEIGHT * down, self._weather.ground_reach)
        self._seeing = None
        if conditions.lidar_blind is not None:
            self._seeing = ~np.repeat(_in_sector(column_azimuth(columns), conditions.lidar_blind), BEAMS)
        self._noise = _Noise(columns, self._weather)
        self._points = np.empty((columns * BEAMS, 5), dtype=np.float32)
        self._points[:, 4] = np.tile(np.arange(BEAMS), columns)

    def scan(self, parts: np.ndarray, reflectivity: np.ndarray, rng: np.random.Generator) -> Scan:
        """Simulate one sweep.

        parts (P, 7): centre x, centre y (m, sensor frame at ground level), yaw (rad, sensor frame), half length, half
        width, bottom, top (m above the ground). reflectivity (P,) in 0..1.
        """
        return next(self.scans(parts[None], reflectivity, rng))

    def scans(self, parts: np.ndarray, reflectivity: np.ndarray, rng: np.random.Generator) -> Iterator[Scan]:
        """Simulate T sweeps: parts (T, P, 7) are for each sweep as in scan. They may move, but not up or down."""
        distance = np.hypot(parts[..., 0], parts[..., 1])
        chances = self._return_chance(reflectivity, distance, self._weather.reach)
        always = np.array([65535, 0], dtype=np.uint16)
        bright = np.concatenate(
            [np.full(BEAMS + 1, _GROUND_REFLECTIVITY), [_GHOST_REFLECTIVITY], reflectivity], dtype=np.float32
        )
        for chance, (cell, hit, part) in zip(chances, self._caster.crossings(parts), strict=True):
            nearest = self._background.copy()
            np.minimum.at(nearest, cell, _ranked(hit, part + _FIRST_PART))
            distance = (nearest >> 32).astype(np.int32).view(np.float32)
            target = nearest & _TARGET_MASK
            yield self._measure(distance, target, np.concatenate([self._ground_chance, always, chance]), bright, rng)

    def _cast_background(self, down: np.ndarray) -> np.ndarray:
        """The ground or the ego's own body as every ray meets it, ranked (columns * BEAMS,).

        down (BEAMS,): horizontal metres per metre that a beam sinks.
        """
        distance = np.tile(HEIGHT * down, self.columns)
        target = np.tile(np.arange(BEAMS), self.columns)
        for x_span, y_span, top in _EGO_BODY:
            # The sensor stands above the body, inside its outline: rays can only meet its top.
            reach = np.tile((HEIGHT - top) * down, self.columns)
            forward, left = self._sin_of_cell * reach + LIDAR_TRANSLATION[0], -self._cos_of_cell * reach
            inside = (x_span[0] < forward) & (forward < x_span[1]) & (y_span[0] < left) & (left < y_span[1])
            distance = np.where(inside, np.minimum(distance, reach), distance)
            target[inside] = _EGO
        return _ranked(distance.astype(np.float32), target)

    def _return_chance(self, reflectivity: np.ndarray, distance: np.ndarray, reach: float) -> np.ndarray:
        """Probability of a return, in units of 1 / 65536."""
        square = (distance / (reach * np.sqrt(np.asarray(reflectivity) / 0.4).clip(0.5, 1.5))) ** 2
        return np.floor((1.0 - self._weather.lost) / (1.0 + square * square * square) * 65535).astype(np.uint16)

    def _measure(
        self,
        distance: np.ndarray,
        target: np.ndarray,
        chance: np.ndarray,
        bright: np.ndarray,
        rng: np.random.Generator,
    ) -> Scan:
        """Ideal distances -> returns: losses, noise, ghosts in the air, intensity.

        chance and bright: of every target, the probability of a return (see _return_chance) and the reflectivity.
        """
        loss, error, speckle, air = self._noise.draw(rng)
        alive = loss < chance.take(target)
        if self._seeing is not None:
            alive &= self._seeing
        if self._weather.ghost > 0:
            is_ghost = air < distance
            distance = np.where(is_ghost, air, distance)
            target = np.where(is_ghost, _AIR, target)
        distance = distance + error
        points = self._points
        np.multiply(distance, self._cos_of_cell, out=points[:, 0])
        np.multiply(distance, self._sin_of_cell, out=points[:, 1])
        np.multiply(distance, self._slope_of_cell, out=points[:, 2])
        intensity = bright.take(target) * speckle
        intensity /= distance * np.float32(1.0 / _FALL_OFF) + np.float32(1.0)
        np.floor(intensity, out=points[:, 3])
        kept = np.flatnonzero(alive)
        return Scan(points.take(kept, axis=0, mode="clip"), target, kept)


class _Noise:
    """Random effects on each ray of a sweep, flat like the range image.

    loss: uint16, of which the ray's chance of a return must be more; error: of the horizontal distance, m; speckle:
    factor on reflectivity that gives the intensity at close range; air: horizontal distance (m) of a drop, if any.
    """

    def __init__(self, columns: int, weather: _Weather):
        rng = np.random.default_rng(0)
        self._columns, shape = columns, (columns + _SHIFTS, BEAMS)
        error = rng.standard_normal(shape, dtype=np.float32) * np.float32(weather.noise)
        error = np.clip(error, -NOISE_LIMIT, NOISE_LIMIT) * BEAM_COS
        loss = rng.integers(0, 65536, shape, dtype=np.uint16)
        speckle = _INTENSITY_SCALE * rng.uniform(*_SPECKLE, shape).astype(np.float32)
        is_ghost = rng.random(shape, dtype=np.float32) < weather.ghost
        air = np.where(is_ghost, rng.uniform(*_GHOST_RANGE, shape), _NOTHING).astype(np.float32)
        self._pictures = loss, error, speckle, air

    def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """loss, error, speckle, air of another sweep."""
        starts = rng.integers(0, _SHIFTS, len(self._pictures)).tolist()
        return [
            picture[start : start + self._columns].reshape(-1)
            for picture, start in zip(self._pictures, starts, strict=True)
        ]


def _ranked(distance: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Distances (n,) float32 and targets (n,) int64 as one number each, ordered by distance and then by target."""
    return (distance.view(np.int32).astype(np.int64) << 32) | target


def _in_sector(azimuth: np.ndarray, sector: tuple[int, int]) -> np.ndarray:
    start, width = sector
    return (np.rad2deg(azimuth) - start) % 360.0 < width


def parts_in_sensor_frame(parts: np.ndarray, poses: np.ndarray, sensor: np.ndarray) -> np.ndarray:
    """Parts as Lidar.scan takes them.

    parts (P, 6) as in Shape, in their actors' frames; poses (..., P, 3) global x, y, yaw of the actor of each part;
    sensor (..., 3): global x (m), y (m) and yaw (rad, of its x axis). Returns (..., P, 7).
    """
    x, y, yaw = np.moveaxis(poses, -1, 0)
    sensor_x, sensor_y, sensor_yaw = np.moveaxis(np.asarray(sensor)[..., None, :], -1, 0)
    cos, sin = np.cos(yaw), np.sin(yaw)
    dx = x + parts[:, 0] * cos - parts[:, 1] * sin - sensor_x
    dy = y + parts[:, 0] * sin + parts[:, 1] * cos - sensor_y
    cos, sin = np.cos(sensor_yaw), np.sin(sensor_yaw)
    out = np.empty((*dx.shape, 7))
    out[..., 0], out[..., 1] = dx * cos + dy * sin, dy * cos - dx * sin
    out[..., 2] = yaw - sensor_yaw
    out[..., 3:] = parts[:, 2:]
    return out
