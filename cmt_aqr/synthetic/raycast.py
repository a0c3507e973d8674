"""Ray casting of whole LiDAR sweeps against upright boxes, exact but for single precision.

The range image is (columns, BEAMS), flattened: columns turn clockwise seen from above, as nuScenes' LiDAR does. The
sensor stands upright, so one column is a vertical plane: a box is first cut by every column it spans (a two-dimensional
slab test), then the beams that hit it follow from the two cutting distances. Motion within one sweep is ignored. The
first step is done for all boxes of several sweeps at once, the second for one sweep at a time.
"""

from collections.abc import Iterator

import numpy as np

BEAMS = 32
LOWEST_BEAM_DEG, HIGHEST_BEAM_DEG = -30.67, 10.67

_ELEVATION = np.deg2rad(np.linspace(LOWEST_BEAM_DEG, HIGHEST_BEAM_DEG, BEAMS))
_FIRST_ELEVATION = np.float32(_ELEVATION[0])
_RINGS_PER_RADIAN = np.float32(1.0 / (_ELEVATION[1] - _ELEVATION[0]))
BEAM_SLOPE = np.tan(_ELEVATION).astype(np.float32)
"""Rise (m) of each beam per metre of horizontal distance; no beam is level."""
BEAM_COS = np.cos(_ELEVATION).astype(np.float32)
"""Horizontal distance (m) of each beam per metre of range."""

_INVERSE_SLOPE = 1.0 / BEAM_SLOPE
_NEVER_ZERO = np.float32(1e-12)
"""Added to cosines: changes none but an exact zero, which must not be divided by."""


def column_azimuth(columns: int) -> np.ndarray:
    """Azimuth (rad, from the sensor's x axis, counter-clockwise) of every column: a sweep starts on the left."""
    return np.pi - (np.arange(columns) + 0.5) * (2 * np.pi / columns)


class RayCaster:
    """Casts sweeps of a number of columns from a height (m) above the ground."""

    def __init__(self, columns: int, height: float):
        self.columns, self._height = columns, np.float32(height)
        azimuth = column_azimuth(columns)
        self.cos, self.sin = np.cos(azimuth).astype(np.float32), np.sin(azimuth).astype(np.float32)

    def crossings(self, parts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All crossings of rays and boxes, sweep after sweep: cell (n,), horizontal distance (n,) float32 m, part (n,).

        parts (T, P, 7): of each sweep the boxes as Lidar.scan takes them; the sensor is outside all of them, and a box
        keeps its bottom and top. cell is column * BEAMS + beam. One ray may cross many boxes; nothing hides anything.
        """
        sweeps, count, _ = parts.shape
        low, high = parts[0, :, 5] - self._height, parts[0, :, 6] - self._height
        # A ray enters through a side, or through the lid: the top (bottom) where it is above (below) it at the side.
        # Boxes that reach from below the sensor to above it, which take most rays, have no lid and come last.
        order = np.argsort((low <= 0) & (high >= 0), kind="stable")
        lids = np.count_nonzero((low > 0) | (high < 0))
        x, y, yaw, half_length, half_width, bottom, top = parts[:, order].reshape(-1, 7).T.astype(np.float32)
        cos, sin = np.cos(yaw), np.sin(yaw)
        box, column = self._columns_of(x, y, cos, sin, half_length, half_width)
        forward, left = x * cos + y * sin, y * cos - x * sin
        table = np.stack([cos, sin, forward, left, half_length, half_width, bottom, top])
        *outline, bottom, top = table.take(box, axis=1)
        enter, leave = self._cut(column, *outline)
        low, high = bottom - self._height, top - self._height
        first, last = _beams_between(enter, leave, low, high)
        hits, corner = np.maximum(last - first + 1, 0), column * BEAMS + first
        part = np.tile(order, sweeps).take(box)
        lid = np.where(high < 0, high, low)
        starts = np.searchsorted(box, np.arange(sweeps + 1) * count).tolist()
        ends_of_lids = np.searchsorted(box, np.arange(sweeps) * count + lids).tolist()
        for start, end_of_lids, end in zip(starts[:-1], ends_of_lids, starts[1:], strict=True):
            rows = slice(start, end)
            yield _spread(hits[rows], corner[rows], enter[rows], lid[start:end_of_lids], part[rows])

    def _columns_of(self, x, y, cos, sin, half_length, half_width) -> tuple[np.ndarray, np.ndarray]:
        """Which columns look at which box: two equally long index arrays (box, column), in the order of boxes."""
        centre = np.arctan2(y, x)
        u_x, u_y = np.cos(centre), np.sin(centre)
        # The corners turned so that the box's centre lies straight ahead.
        ahead_x, ahead_y = cos * u_x + sin * u_y, sin * u_x - cos * u_y
        distance = x * u_x + y * u_y
        along = np.array([1, 1, -1, -1], dtype=np.float32)[:, None] * half_length
        across = np.array([1, -1, 1, -1], dtype=np.float32)[:, None] * half_width
        spread = np.arctan2(along * ahead_y + across * ahead_x, distance + along * ahead_x - across * ahead_y)
        per_radian = self.columns / (2 * np.pi)
        middle = np.pi - centre.astype(np.float64)
        first = np.ceil((middle - spread.max(0)) * per_radian - 0.5).astype(np.int64)
        last = np.floor((middle - spread.min(0)) * per_radian - 0.5).astype(np.int64)
        count = np.maximum(last - first + 1, 0)
        box = np.repeat(np.arange(len(x)), count)
        column = np.arange(len(box)) + (first - np.cumsum(count) + count).take(box)
        column[column < 0] += self.columns
        column[column >= self.columns] -= self.columns
        return box, column

    def _cut(self, column, cos, sin, forward, left, half_length, half_width) -> tuple[np.ndarray, np.ndarray]:
        """Horizontal distances (m) at which a column's plane enters and leaves the outline of a box.

        forward, left: the box's centre from the sensor along the box's own axes (m).
        """
        ray_x, ray_y = self.cos.take(column), self.sin.take(column)
        inverse_x = 1.0 / (ray_x * cos + ray_y * sin + _NEVER_ZERO)
        inverse_y = 1.0 / (ray_y * cos - ray_x * sin + _NEVER_ZERO)
        middle_x, middle_y = forward * inverse_x, left * inverse_y
        extent_x, extent_y = half_length * np.abs(inverse_x), half_width * np.abs(inverse_y)
        enter = np.maximum(middle_x - extent_x, middle_y - extent_y)
        leave = np.minimum(middle_x + extent_x, middle_y + extent_y)
        return enter, np.maximum(leave, enter)


def _beams_between(enter, leave, low, high) -> tuple[np.ndarray, np.ndarray]:
    """First and last beam (n,) that meet what is low to high (m) above the sensor from distance enter to leave (m)."""
    near, far = 1.0 / enter, 1.0 / leave
    lowest = np.arctan(np.minimum(low * near, low * far))
    highest = np.arctan(np.maximum(high * near, high * far))
    first = np.ceil((lowest - _FIRST_ELEVATION) * _RINGS_PER_RADIAN).clip(0, BEAMS).astype(np.int64)
    last = np.floor((highest - _FIRST_ELEVATION) * _RINGS_PER_RADIAN).clip(-1, BEAMS - 1).astype(np.int64)
    return first, last


def _spread(hits, corner, enter, lid, part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crossings (see RayCaster.crossings) of rows: hits beams of one column from cell corner on, of one part.

    lid: height (m) above the sensor of the lids of the first rows; the others have none.
    """
    row = np.repeat(np.arange(len(hits)), hits)
    cell = (corner - np.cumsum(hits) + hits).take(row)
    cell += np.arange(len(row))
    hit = enter.take(row)
    lidded = slice(0, int(hits[: len(lid)].sum()))
    through_lid = lid.take(row[lidded]) * _INVERSE_SLOPE.take(cell[lidded] & (BEAMS - 1))
    np.maximum(hit[lidded], through_lid, out=hit[lidded])
    return cell, hit, part.take(row)
