"""The road as a curve, and how far traffic has come along it at a given time."""

from dataclasses import dataclass

import numpy as np

ROAD_STEP = 0.25
"""Spacing (m) of the tabulated centre line."""

TIME_STEP = 0.02
"""Spacing (s) of tabulated speeds; positions between are interpolated."""

TIME_MARGIN = 1.0
"""Seconds that are tabulated before the first and after the last key frame (cameras fire early)."""


@dataclass(frozen=True)
class Road:
    """Centre line of a road, by arc length s (m): heading(s) = heading0 + sum_k amplitude_k sin(s / scale_k + phase_k).

    Lateral offsets l (m) are positive to the left of the direction of growing s.
    """

    start: float
    x: np.ndarray
    y: np.ndarray
    heading0: float
    amplitude: np.ndarray
    scale: np.ndarray
    phase: np.ndarray

    @property
    def end(self) -> float:
        """Arc length of the last tabulated point."""
        return self.start + ROAD_STEP * (len(self.x) - 1)

    def heading(self, s: np.ndarray) -> np.ndarray:
        """Direction (rad, global frame) of the centre line at s (any shape)."""
        waves = self.amplitude * np.sin(np.asarray(s)[..., None] / self.scale + self.phase)
        return self.heading0 + waves.sum(-1)

    def curvature(self, s: np.ndarray) -> np.ndarray:
        """Derivative of the heading (1/m) at s."""
        waves = self.amplitude / self.scale * np.cos(np.asarray(s)[..., None] / self.scale + self.phase)
        return waves.sum(-1)

    def place(self, s: np.ndarray, lateral: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Global x (m), y (m) and heading (rad) at arc length s and lateral offset (same shapes)."""
        position = np.clip((np.asarray(s) - self.start) / ROAD_STEP, 0.0, len(self.x) - 1.001)
        index = position.astype(np.int64)
        weight = position - index
        heading = self.heading(s)
        x = self.x[index] * (1 - weight) + self.x[index + 1] * weight - lateral * np.sin(heading)
        y = self.y[index] * (1 - weight) + self.y[index + 1] * weight + lateral * np.cos(heading)
        return x, y, heading


def draw_road(rng: np.random.Generator, start: float, end: float, origin: tuple[float, float]) -> Road:
    """A random gently curving road (radius above about 90 m) that passes through origin (global x, y) at s = 0."""
    heading0 = rng.uniform(-np.pi, np.pi)
    scale = rng.uniform([28.0, 60.0], [45.0, 110.0])
    amplitude = rng.uniform([0.0, 0.1], [0.12, 0.45])
    phase = rng.uniform(-np.pi, np.pi, 2)
    first = np.floor(start / ROAD_STEP) * ROAD_STEP
    count = int(np.ceil((end - first) / ROAD_STEP)) + 1
    road = Road(first, np.zeros(count), np.zeros(count), heading0, amplitude, scale, phase)
    middles = first + (np.arange(count - 1) + 0.5) * ROAD_STEP
    heading = road.heading(middles)
    x = np.concatenate([[0.0], np.cumsum(np.cos(heading)) * ROAD_STEP])
    y = np.concatenate([[0.0], np.cumsum(np.sin(heading)) * ROAD_STEP])
    zero = round(-first / ROAD_STEP)
    return Road(first, x - x[zero] + origin[0], y - y[zero] + origin[1], heading0, amplitude, scale, phase)


@dataclass(frozen=True)
class SpeedProfile:
    """Speed (m/s) and distance (m) over time, tabulated (n,) from -TIME_MARGIN s; distance is 0 at time 0.

    Several profiles side by side (n, K) give results with K columns.
    """

    speed: np.ndarray
    distance: np.ndarray

    def distance_at(self, time: np.ndarray) -> np.ndarray:
        """Metres travelled since time 0, at times (s) of any shape (...): (...) or (..., K)."""
        return self._interpolate(self.distance, time)

    def speed_at(self, time: np.ndarray) -> np.ndarray:
        """Speed (m/s) at times (s) of any shape (...): (...) or (..., K)."""
        return self._interpolate(self.speed, time)

    def _interpolate(self, table: np.ndarray, time: np.ndarray) -> np.ndarray:
        position = np.clip((np.asarray(time) + TIME_MARGIN) / TIME_STEP, 0.0, len(table) - 1.001)
        index = position.astype(np.int64)
        weight = (position - index)[..., None] if table.ndim == 2 else position - index
        return table[index] * (1 - weight) + table[index + 1] * weight


def draw_profile(
    rng: np.random.Generator, duration: float, speed: tuple[float, float], stop_share: float
) -> SpeedProfile:
    """A random speed profile: a mean in the range speed (m/s) with slow waves; with probability stop_share traffic
    brakes to a halt somewhere in the scene and may start again."""
    time = _table_times(duration)
    mean = rng.uniform(*speed)
    swing = rng.uniform(0.05, 0.25) * mean
    values = mean + swing * np.sin(time * rng.uniform(0.3, 0.7) + rng.uniform(-np.pi, np.pi))
    if rng.random() < stop_share:
        brake, wait, ramp = rng.uniform(0.0, 0.7 * duration), rng.uniform(1.5, 5.0), rng.uniform(3.0, 4.5)
        values = values * np.clip(np.maximum((brake - time) / ramp, (time - brake - wait) / ramp), 0.0, 1.0)
    return _tabulate(values)


def side_by_side(profiles: list[SpeedProfile]) -> SpeedProfile:
    """K profiles as one with K columns."""
    return SpeedProfile(
        np.stack([profile.speed for profile in profiles], -1), np.stack([profile.distance for profile in profiles], -1)
    )


def still_profile(duration: float) -> SpeedProfile:
    """The profile of whatever does not move."""
    return _tabulate(np.zeros_like(_table_times(duration)))


def _table_times(duration: float) -> np.ndarray:
    count = round((duration + 2 * TIME_MARGIN) / TIME_STEP) + 2
    return np.arange(count) * TIME_STEP - TIME_MARGIN


def _tabulate(speed: np.ndarray) -> SpeedProfile:
    distance = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2) * TIME_STEP])
    zero = round(TIME_MARGIN / TIME_STEP)
    return SpeedProfile(speed, distance - distance[zero])
