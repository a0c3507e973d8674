"""A 32-beam spinning LiDAR, ray-cast against upright boxes and a flat ground.

The range image is (columns, beams): columns turn clockwise seen from above, as nuScenes' LiDAR does. The sensor stands
upright, so one column is a vertical plane: a box is first cut by every column it spans (a two-dimensional slab test),
then the beams that hit it follow from the two cutting distances. Motion within one turn is ignored.
"""

from dataclasses import dataclass

import numpy as np

from cmt_aqr.synthetic.calibration import LIDAR_TRANSLATION
from cmt_aqr.synthetic.conditions import Conditions

BEAMS = 32
LOWEST_BEAM_DEG, HIGHEST_BEAM_DEG = -30.67, 10.67
HEIGHT = LIDAR_TRANSLATION[2]
"""Height (m) of the sensor above the ground."""

NOISE_LIMIT = 0.05
"""Range noise is clipped at this (m), below shapes.INSET, so that no object point ever leaves its annotation box."""

FROM_GROUND, FROM_AIR = -1, -2
"""Values of Scan.part for points on the ground or the ego itself, and for drops and fog in the air."""

# Body and roof of the ego in the ego frame: x and y spans, top (m).
_EGO_BODY = (((-0.75, 3.45), (-0.88, 0.88), 0.95), ((-0.45, 2.05), (-0.72, 0.72), 1.52))

_GROUND_REFLECTIVITY = 0.12
_GHOST_RANGE = (2.0, 9.0)
_GHOST_REFLECTIVITY = 0.05
_INTENSITY_SCALE, _FALL_OFF = 110.0, 60.0
_NOISE_TABLE = 4096
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
    """One turn. points (n, 5) float32: x y z (m, sensor frame), intensity 0..255, ring; part (n,): what was hit.

    part is an index into the parts that were cast, or FROM_GROUND or FROM_AIR.
    """

    points: np.ndarray
    part: np.ndarray


class Lidar:
    """The sensor in the conditions of one scene."""

    def __init__(self, columns: int, conditions: Conditions):
        self.columns = columns
        self._weather = _WEATHERS[conditions.weather]
        elevation = np.deg2rad(np.linspace(LOWEST_BEAM_DEG, HIGHEST_BEAM_DEG, BEAMS))
        self._slope = np.tan(elevation).astype(np.float32)
        self._inverse_slope = (1.0 / np.tan(elevation)).astype(np.float32)
        self._first, self._spacing = elevation[0], elevation[1] - elevation[0]
        azimuth = column_azimuth(columns)
        self._cos, self._sin = np.cos(azimuth).astype(np.float32), np.sin(azimuth).astype(np.float32)
        self._cos_of_cell, self._sin_of_cell = np.repeat(self._cos, BEAMS), np.repeat(self._sin, BEAMS)
        self._slope_of_cell = np.tile(self._slope, columns)
        self._ring_of_cell = np.tile(np.arange(BEAMS, dtype=np.float32), columns)
        self._per_range = np.tile(np.cos(elevation).astype(np.float32), columns)
        self._background, ego = self._cast_background()
        self._ground_chance = self._return_chance(_GROUND_REFLECTIVITY, self._background, self._weather.ground_reach)
        self._ground_chance[ego] = 65535
        if conditions.lidar_blind is not None:
            self._blind = np.repeat(_in_sector(azimuth, conditions.lidar_blind), BEAMS)
        else:
            self._blind = None
        noise = np.random.default_rng(0).standard_normal(_NOISE_TABLE) * self._weather.noise
        self._noise = np.clip(noise, -NOISE_LIMIT, NOISE_LIMIT).astype(np.float32)

    def scan(self, parts: np.ndarray, reflectivity: np.ndarray, rng: np.random.Generator) -> Scan:
        """Turn once.

        parts (P, 7): centre x, centre y (m, sensor frame at ground level), yaw (rad, sensor frame), half length, half
        width, bottom, top (m above the ground). reflectivity (P,) in 0..1.
        """
        distance = self._background.copy()
        cell, hit, part = self._cast(parts.astype(np.float32))
        np.minimum.at(distance, cell, hit)
        owner = np.full(distance.shape, FROM_GROUND, dtype=np.int32)
        won = distance.take(cell) == hit
        owner[cell.compress(won)] = part.compress(won)
        return self._measure(distance, owner, parts, reflectivity, rng)

    def _cast_background(self) -> tuple[np.ndarray, np.ndarray]:
        """Horizontal distance (columns * BEAMS,) to the ground or the ego's own body, and where it is the body."""
        down = np.where(self._slope < 0, -1.0 / self._slope, _NOTHING)
        distance = np.tile(HEIGHT * down, self.columns)
        ego = np.zeros(distance.shape, dtype=bool)
        for x_span, y_span, top in _EGO_BODY:
            # The sensor stands above the body, inside its outline: rays can only meet its top.
            reach = (HEIGHT - top) * down
            forward, left = self._sin[:, None] * reach + LIDAR_TRANSLATION[0], -self._cos[:, None] * reach
            inside = (x_span[0] < forward) & (forward < x_span[1]) & (y_span[0] < left) & (left < y_span[1])
            distance = np.where(inside.ravel(), np.minimum(distance, np.tile(reach, self.columns)), distance)
            ego |= inside.ravel()
        return distance.astype(np.float32), ego

    def _cast(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All crossings of rays and parts: cell (n,) in the flat range image, horizontal distance (m), part."""
        part, column = self._columns_of(parts)
        enter, leave = self._cut(parts, part, column)
        low, high = parts[:, 5] - np.float32(HEIGHT), parts[:, 6] - np.float32(HEIGHT)
        bottom, top = low[part], high[part]
        near, far = 1.0 / enter, 1.0 / leave
        lowest = np.arctan(np.minimum(bottom * near, bottom * far))
        highest = np.arctan(np.maximum(top * near, top * far))
        to_ring = np.float32(1.0 / self._spacing)
        first = np.ceil((lowest - np.float32(self._first)) * to_ring).astype(np.int32).clip(0, BEAMS)
        last = np.floor((highest - np.float32(self._first)) * to_ring).astype(np.int32).clip(-1, BEAMS - 1)
        count = np.maximum(last - first + 1, 0)
        # A ray enters through a side, or through the top (bottom) where it is still above (below) at the side.
        lid = np.where(high < 0, high, np.where(low > 0, low, np.float32(0.0)))[part]
        pair = np.repeat(np.arange(len(count), dtype=np.int32), count)
        run_start = np.cumsum(count, dtype=np.int32) - count
        cell = (column * BEAMS + first - run_start).take(pair)
        cell += np.arange(len(pair), dtype=np.int32)
        hit = np.maximum(enter.take(pair), lid.take(pair) * self._inverse_slope.take(cell & (BEAMS - 1)))
        return cell, hit, part.take(pair)

    def _columns_of(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which columns look at which part: two equally long index arrays (part, column)."""
        x, y, yaw, half_length, half_width = parts[:, :5].T
        cos, sin = np.cos(yaw), np.sin(yaw)
        centre = np.arctan2(y, x)
        u_x, u_y = np.cos(centre), np.sin(centre)
        along = np.array([1, 1, -1, -1], dtype=np.float32)[:, None] * half_length
        across = np.array([1, -1, 1, -1], dtype=np.float32)[:, None] * half_width
        corner_x, corner_y = x + along * cos - across * sin, y + along * sin + across * cos
        spread = np.arctan2(corner_y * u_x - corner_x * u_y, corner_x * u_x + corner_y * u_y)
        step = 2 * np.pi / self.columns
        first = np.ceil((np.pi - centre - spread.max(0)) / step - 0.5).astype(np.int64)
        last = np.floor((np.pi - centre - spread.min(0)) / step - 0.5).astype(np.int64)
        count = np.maximum(last - first + 1, 0)
        part = np.repeat(np.arange(len(parts), dtype=np.int32), count)
        column = np.arange(len(part)) + (first - np.cumsum(count) + count)[part]
        return part, (column % self.columns).astype(np.int32)

    def _cut(self, parts: np.ndarray, part: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Horizontal distances (m) at which a column's plane enters and leaves the outline of a part."""
        x, y, yaw, half_length, half_width = parts[:, :5].T
        cos, sin = np.cos(yaw), np.sin(yaw)
        origin_x, origin_y = -(x * cos + y * sin), x * sin - y * cos
        ray_x, ray_y = self._cos[column], self._sin[column]
        cos, sin = cos[part], sin[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse_x = 1.0 / (ray_x * cos + ray_y * sin)
            inverse_y = 1.0 / (ray_y * cos - ray_x * sin)
        middle_x, middle_y = -origin_x[part] * inverse_x, -origin_y[part] * inverse_y
        extent_x, extent_y = half_length[part] * np.abs(inverse_x), half_width[part] * np.abs(inverse_y)
        enter = np.maximum(middle_x - extent_x, middle_y - extent_y)
        leave = np.minimum(middle_x + extent_x, middle_y + extent_y)
        return enter, np.maximum(leave, enter)

    def _return_chance(self, reflectivity: np.ndarray, distance: np.ndarray, reach: float) -> np.ndarray:
        """Probability of a return, in units of 1 / 65536."""
        ratio = distance / (reach * np.sqrt(np.asarray(reflectivity) / 0.4).clip(0.5, 1.5))
        return np.floor((1.0 - self._weather.lost) / (1.0 + ratio**6) * 65535).astype(np.uint16)

    def _measure(
        self,
        distance: np.ndarray,
        owner: np.ndarray,
        parts: np.ndarray,
        reflectivity: np.ndarray,
        rng: np.random.Generator,
    ) -> Scan:
        """Turn ideal distances into returns: losses, noise, ghosts in the air, intensity."""
        draws = np.frombuffer(rng.bytes(4 * len(distance)), dtype=np.uint16).reshape(2, -1)
        # One row per part, and last the ground's, which index -1 (FROM_GROUND) picks.
        part_chance = self._return_chance(reflectivity, np.hypot(parts[:, 0], parts[:, 1]), self._weather.reach)
        alive = np.append(part_chance, np.uint16(0)).take(owner, mode="wrap")
        alive = draws[0] < np.where(owner == FROM_GROUND, self._ground_chance, alive)
        if self._blind is not None:
            alive &= ~self._blind
        if self._weather.ghost > 0:
            is_ghost = rng.random(len(distance), dtype=np.float32) < self._weather.ghost
            near = rng.uniform(*_GHOST_RANGE, len(distance)).astype(np.float32)
            is_ghost &= near < distance
            distance = np.where(is_ghost, near, distance)
            owner = np.where(is_ghost, FROM_AIR, owner)
        distance = distance + self._noise.take(draws[1] & (_NOISE_TABLE - 1)) * self._per_range
        bright = np.append(reflectivity, [_GHOST_REFLECTIVITY, _GROUND_REFLECTIVITY]).astype(np.float32)
        # The high bits of the draw that chose the noise are as good as another draw.
        speckle = (draws[1] >> 12) * np.float32(0.5 / 15) + np.float32(0.75)
        points = np.empty((len(distance), 5), dtype=np.float32)
        np.multiply(distance, self._cos_of_cell, out=points[:, 0])
        np.multiply(distance, self._sin_of_cell, out=points[:, 1])
        np.multiply(distance, self._slope_of_cell, out=points[:, 2])
        intensity = _INTENSITY_SCALE * bright.take(owner, mode="wrap") * speckle / (1.0 + distance / _FALL_OFF)
        np.floor(intensity, out=points[:, 3])
        points[:, 4] = self._ring_of_cell
        return Scan(points.compress(alive, axis=0), owner.compress(alive))


def column_azimuth(columns: int) -> np.ndarray:
    """Azimuth (rad, from the sensor's x axis, counter-clockwise) of every column: the turn starts on the left."""
    return np.pi - (np.arange(columns) + 0.5) * (2 * np.pi / columns)


def _in_sector(azimuth: np.ndarray, sector: tuple[int, int]) -> np.ndarray:
    start, width = sector
    return (np.rad2deg(azimuth) - start) % 360.0 < width


def parts_in_sensor_frame(parts: np.ndarray, poses: np.ndarray, sensor: tuple[float, float, float]) -> np.ndarray:
    """Parts as Lidar.scan takes them.

    parts (P, 6) as in Shape, in their actors' frames; poses (P, 3) global x, y, yaw of the actor of each part; sensor:
    global x (m), y (m) and yaw (rad, of its x axis). Returns (P, 7).
    """
    x, y, yaw = poses.T
    cos, sin = np.cos(yaw), np.sin(yaw)
    dx = x + parts[:, 0] * cos - parts[:, 1] * sin - sensor[0]
    dy = y + parts[:, 0] * sin + parts[:, 1] * cos - sensor[1]
    cos, sin = np.cos(sensor[2]), np.sin(sensor[2])
    return np.column_stack([dx * cos + dy * sin, dy * cos - dx * sin, yaw - sensor[2], parts[:, 2:]])
