"""What the cameras see behind the objects: ground with lane markings, sky, haze; and what spoils an image."""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from cmt_aqr.rotations import rotation_matrix
from cmt_aqr.synthetic.calibration import (
    FULL_IMAGE_SIZE,
    CameraMount,
    intrinsic_matrix,
    inverse_intrinsic,
)
from cmt_aqr.synthetic.conditions import Conditions
from cmt_aqr.synthetic.road import Road
from cmt_aqr.synthetic.street import (
    BIKE_EDGE,
    CROSSING_HALF_WIDTH,
    CURB,
    INNER_LANE,
    LANE_EDGE,
    OUTER_LANE,
    SIDEWALK_END,
)

METRES_PER_TEXEL = 0.125
GROUND_REACH = 95.0
"""How far (m) around the driven stretch the ground is painted."""

_ASPHALT, _BIKE, _PARKING, _WALK, _GRASS = (92, 90, 88), (84, 84, 118), (104, 102, 100), (150, 155, 158), (70, 110, 88)
_PAINT = (225, 225, 225)
_FLAT_SUN = 0.6
"""Share of the sun's light that falls on level ground."""

_HORIZON = 1e-3
"""Sine of the angle below the horizontal at which the ground ends and the sky begins."""

_CLEAR_ENOUGH = 0.97
"""Haze is left out of image rows that it would change by less than 3 %."""

_GRAIN_SHIFT = 64
"""The sensor noise is one fixed picture, shifted by up to this many pixels from image to image."""


@dataclass(frozen=True)
class Light:
    """Light of a scene: factors on colours, colours in BGR 0..255, visibility (m) of the haze, sensor noise."""

    ambient: float
    sun: float
    headlight: float
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    visibility: float
    noise: float


_LIGHTS = {
    "day": Light(0.62, 0.42, 0.0, (215, 165, 110), (225, 215, 200), 700.0, 2.0),
    "dusk": Light(0.36, 0.16, 0.25, (120, 85, 80), (110, 140, 200), 500.0, 4.0),
    "night": Light(0.2, 0.0, 0.7, (22, 12, 8), (38, 28, 24), 400.0, 7.0),
}
_VISIBILITY = {"clear": 1.0, "rain": 0.22, "fog": 0.055}
_GREY_SKY = {"clear": 0.0, "rain": 0.75, "fog": 0.95}


def scene_light(conditions: Conditions) -> Light:
    """The light that a scene's conditions make."""
    light = _LIGHTS[conditions.light]
    grey = _GREY_SKY[conditions.weather]
    level = float(np.mean(light.horizon)) * 0.85
    zenith, horizon = (tuple((1 - grey) * np.array(colour) + grey * level) for colour in (light.zenith, light.horizon))
    sun = light.sun * (1 - 0.8 * grey)
    visibility = light.visibility * _VISIBILITY[conditions.weather]
    return Light(light.ambient, sun, light.headlight, zenith, horizon, visibility, light.noise)


def headlight_gain(light: Light, forward: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Brightness factor of things at ego coordinates forward, left (m): ambient light plus the ego's headlights."""
    distance = np.hypot(forward, left) + 1e-6
    beam = np.clip((forward / distance - 0.75) / 0.2, 0.0, 1.0) * np.exp(-((distance / 32.0) ** 2))
    return _daylight(light) + light.headlight * beam


def _daylight(light: Light) -> float:
    """Brightness factor of level ground without the headlights."""
    return light.ambient + _FLAT_SUN * light.sun


class Ground:
    """A top-view picture of the street in daylight or, for cameras to light it, at its full brightness when the ego has
    its headlights on. Cameras project it by a homography. Four channels, the last one zero; outside is its colour
    beyond the borders.
    """

    def __init__(
        self,
        road: Road,
        stretch: tuple[float, float],
        crossings: tuple[float, ...],
        light: Light,
        rng: np.random.Generator,
    ):
        s = np.arange(stretch[0] - GROUND_REACH, stretch[1] + GROUND_REACH, 1.0)
        x, y, _ = road.place(s, np.zeros_like(s))
        self._low = np.array([x.min(), y.min()]) - 30.0
        size = np.ceil((np.array([x.max(), y.max()]) + 30.0 - self._low) / METRES_PER_TEXEL).astype(int)
        self.image = _plain((size[1], size[0]), _GRASS)
        for lateral, colour in ((SIDEWALK_END, _WALK), (CURB, _PARKING), (BIKE_EDGE, _BIKE), (LANE_EDGE, _ASPHALT)):
            self._fill(road, s[None], [-lateral], [lateral], colour)
        edges = [side * lateral for lateral in (BIKE_EDGE, LANE_EDGE) for side in (-1, 1)]
        self._line(road, s[None], edges, 0.15)
        self._line(road, s[None], [-CURB, CURB], 0.3)
        self._line(road, s[None], [0.0], 0.25)
        dashes = np.arange(s[0], s[-1], 9.0)[:, None] + np.linspace(0, 3.5, 5)
        for side in (-1, 1):
            self._line(road, dashes, np.full(len(dashes), side * (INNER_LANE + OUTER_LANE) / 2), 0.2)
        bars = np.arange(-LANE_EDGE + 0.3, LANE_EDGE - 0.5, 1.0)
        for at in crossings:
            ends = np.array([[at - CROSSING_HALF_WIDTH + 0.5, at + CROSSING_HALF_WIDTH - 0.5]])
            self._fill(road, ends, bars, bars + 0.5, _PAINT)
        self._roughen(rng)
        is_lit_here = light.headlight == 0
        if is_lit_here:
            cv2.convertScaleAbs(self.image, dst=self.image, alpha=_daylight(light))
        self.outside = tuple(value * (_daylight(light) if is_lit_here else 1.0) for value in _GRASS)

    def to_texels(self) -> np.ndarray:
        """Matrix (3, 3) from homogeneous global ground coordinates (x, y, 1) to texel coordinates."""
        scale = 1.0 / METRES_PER_TEXEL
        return np.array([[scale, 0, -self._low[0] * scale], [0, scale, -self._low[1] * scale], [0, 0, 1.0]])

    def _points(self, road: Road, s: np.ndarray, lateral: np.ndarray) -> np.ndarray:
        x, y, _ = road.place(*np.broadcast_arrays(s, np.asarray(lateral)[:, None]))
        return np.rint((np.stack([x, y], -1) - self._low) / METRES_PER_TEXEL * 16).astype(np.int32)

    def _fill(self, road: Road, s: np.ndarray, right, left, colour) -> None:
        """Paint k strips that run along s (k or 1, n) from lateral offsets right (k,) to left (k,)."""
        outlines = np.concatenate([self._points(road, s, right), self._points(road, s, left)[:, ::-1]], axis=1)
        for outline in outlines:
            cv2.fillPoly(self.image, [outline], (*colour, 0), cv2.LINE_8, 4)

    def _line(self, road: Road, s: np.ndarray, lateral, width: float) -> None:
        lateral = np.asarray(lateral)
        self._fill(road, s, lateral - width / 2, lateral + width / 2, _PAINT)

    def _roughen(self, rng: np.random.Generator) -> None:
        tile = rng.integers(0, 26, (256, 256, 1), dtype=np.uint8)
        coarse = cv2.resize(rng.integers(0, 30, (16, 16, 1), dtype=np.uint8), (256, 256))[..., None]
        grain = np.repeat(tile + coarse, 4, axis=2)
        grain[..., 3] = 0
        height, width = self.image.shape[:2]
        for row in range(0, height, 256):
            for column in range(0, width, 256):
                block = self.image[row : row + 256, column : column + 256]
                cv2.subtract(block, grain[: block.shape[0], : block.shape[1]], dst=block)


@dataclass(frozen=True)
class _Rays:
    """Where each pixel of a camera looks, float32. is_sky (H, W); zenith (H', W): how much of the zenith's colour is in
    the sky of the rows that have any; forward, left (H - top, W): ego coordinates (m) of the ground seen in the rows
    from top on; reach: its distance (m) from the camera."""

    is_sky: np.ndarray
    zenith: np.ndarray
    top: int
    forward: np.ndarray
    left: np.ndarray
    reach: np.ndarray


@cache
def _rays(mount: CameraMount, image_size: tuple[int, int]) -> _Rays:
    width, height = image_size
    column, row = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    matrix = rotation_matrix(mount.rotation) @ inverse_intrinsic(intrinsic_matrix(mount, image_size))
    matrix = matrix.astype(np.float32)
    x, y, z = (matrix[axis, 0] * column + matrix[axis, 1] * row + matrix[axis, 2] for axis in range(3))
    length = np.sqrt(x * x + y * y + z * z)
    up = z / length
    top = int(np.argmax((up < -_HORIZON).any(axis=1)))
    reach = mount.translation[2] / np.maximum(-up[top:], _HORIZON)
    forward, left = x[top:] / length[top:] * reach, y[top:] / length[top:] * reach
    is_sky = up > -_HORIZON
    last_sky = int(height - np.argmax(is_sky.any(axis=1)[::-1])) if is_sky.any() else 0
    zenith = np.clip(up[:last_sky] / np.float32(0.35), 0.0, 1.0) ** np.float32(0.6)
    return _Rays(is_sky, zenith, top, forward + mount.translation[0], left + mount.translation[1], reach)


class Backdrop:
    """Sky, ground and haze of one camera; what only depends on the mount and the light is worked out once."""

    def __init__(self, mount: CameraMount, image_size: tuple[int, int], light: Light):
        rays = _rays(mount, image_size)
        self._size, self._top = image_size, rays.top
        self._last_sky = len(rays.zenith)
        self._sky = np.zeros((*rays.zenith.shape, 4), dtype=np.uint8)
        for channel, (horizon, zenith) in enumerate(zip(light.horizon, light.zenith, strict=True)):
            self._sky[..., channel] = horizon + (zenith - horizon) * rays.zenith
        self._sky_mask = rays.is_sky[: self._last_sky].astype(np.uint8)
        clear = np.exp(-rays.reach / np.float32(light.visibility))
        far_rows = np.flatnonzero((clear < _CLEAR_ENOUGH).any(axis=1))
        self._hazy = self._top + (int(far_rows[-1]) + 1 if len(far_rows) else 0)
        self._clear = clear[: self._hazy - self._top]
        self._dim = 1.0 - self._clear
        self._haze = _plain(self._clear.shape, np.rint(light.horizon))
        self._gain = None
        if light.headlight > 0:
            self._gain = cv2.merge([headlight_gain(light, rays.forward, rays.left).astype(np.float32)] * 4)

    def draw(self, ground: Ground, to_texels: np.ndarray) -> np.ndarray:
        """Image (H, W, 4) uint8, last channel 0. to_texels (3, 3): from pixels to the ground's texels."""
        width, height = self._size
        image = np.empty((height, width, 4), dtype=np.uint8)
        image[: self._top] = self._sky[: self._top]
        below = image[self._top :]
        shifted = np.column_stack([to_texels[:, :2], to_texels[:, 1] * self._top + to_texels[:, 2]])
        cv2.warpPerspective(
            ground.image,
            shifted,
            (width, height - self._top),
            dst=below,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(*ground.outside, 0),
        )
        if self._gain is not None:
            cv2.multiply(below, self._gain, dst=below, dtype=cv2.CV_8U)
        hazy = image[self._top : self._hazy]
        if len(hazy):
            cv2.blendLinear(hazy, self._haze, self._clear, self._dim, dst=hazy)
        horizon = slice(self._top, self._last_sky)
        if self._last_sky > self._top:
            cv2.copyTo(self._sky[horizon], self._sky_mask[horizon], image[horizon])
        return image


class Spoiler:
    """What rain, dirt, glare and the sensor's own noise do to one camera's finished images."""

    def __init__(
        self, channel: str, image_size: tuple[int, int], conditions: Conditions, light: Light, rng: np.random.Generator
    ):
        scale = image_size[0] / FULL_IMAGE_SIZE[0]
        self._size = image_size
        self._grain_up, self._grain_down = _grain(image_size, light.noise)
        self._streaks = _rain_streaks(image_size, scale, rng) if conditions.weather == "rain" else None
        self._glow = _glow(image_size, rng) if conditions.camera_glare == channel else None
        self._dirt = _dirt(image_size, scale, rng) if conditions.camera_dirt == channel else None

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The spoiled copy of an image (H, W, 3) uint8."""
        width, height = self._size
        column, row = rng.integers(0, _GRAIN_SHIFT, 2)
        window = np.s_[row : row + height, column : column + width]
        if self._streaks is not None:
            image = cv2.addWeighted(image, 0.85, np.roll(self._streaks, int(rng.integers(height)), axis=0), 1.0, 12.0)
        if self._dirt is not None:
            clean, mud = self._dirt
            image = cv2.blendLinear(image, mud, clean, 1.0 - clean)
        if self._glow is not None:
            image = cv2.add(image, self._glow)
        image = cv2.add(image, self._grain_up[window])
        return cv2.subtract(image, self._grain_down[window], dst=image)


@cache
def _grain(image_size: tuple[int, int], level: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise of a standard deviation in grey levels, as the part to add and the part to subtract; shared by scenes."""
    shape = (image_size[1] + _GRAIN_SHIFT, image_size[0] + _GRAIN_SHIFT)
    grain = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * np.float32(level)
    up, down = grain.clip(0, 60).astype(np.uint8), (-grain).clip(0, 60).astype(np.uint8)
    return cv2.cvtColor(up, cv2.COLOR_GRAY2BGR), cv2.cvtColor(down, cv2.COLOR_GRAY2BGR)


def _rain_streaks(image_size: tuple[int, int], scale: float, rng: np.random.Generator) -> np.ndarray:
    width, height = image_size
    streaks = np.zeros((height, width, 3), dtype=np.uint8)
    for _ in range(350):
        x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(15, 60) * scale
        level = int(rng.integers(15, 50))
        cv2.line(
            streaks,
            (int(x), int(y)),
            (int(x + 0.15 * length), int(y + length)),
            (level, level, level),
            max(1, round(2 * scale)),
        )
    return streaks


def _glow(image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    width, height = image_size
    x, y = width * rng.uniform(0.25, 0.75), height * rng.uniform(0.25, 0.5)
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    radius = np.hypot(column - x, row - y) / width
    level = 320 * np.exp(-radius / 0.12) + 110 * np.exp(-radius / 0.6)
    return (level[..., None] * np.array([0.88, 0.96, 1.0])).clip(0, 255).astype(np.uint8)


def _dirt(image_size: tuple[int, int], scale: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    width, height = image_size
    mask = np.zeros((height, width), dtype=np.float32)
    for _ in range(int(rng.integers(10, 22))):
        centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        axes = (int(rng.uniform(30, 170) * scale), int(rng.uniform(30, 130) * scale))
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (0, 0), 22 * scale) * np.float32(0.93)
    mud = cv2.cvtColor(_plain((height, width), (48, 62, 74)), cv2.COLOR_BGRA2BGR)
    return 1.0 - mask, mud


def _plain(shape: tuple[int, int], colour) -> np.ndarray:
    """A picture (H, W, 4) uint8 of one colour BGR, last channel 0."""
    pixel = np.array([*colour, 0]).astype(np.uint8).view(np.uint32)
    return np.full(shape, pixel).view(np.uint8).reshape(*shape, 4)


def release() -> None:
    """Forget the pictures that scenes share."""
    _rays.cache_clear()
    _grain.cache_clear()


def ground_homography(to_global: np.ndarray, position: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Matrix (3, 3) from homogeneous pixels to homogeneous global ground coordinates (z = 0).

    to_global (3, 3): camera axes in the global frame; position (3,): camera centre, m.
    """
    # The ray r of a pixel meets the ground at position - position[2] / r[2] * r; times r[2] that is linear in r.
    rays = to_global @ inverse_intrinsic(intrinsic)
    ground = position[:, None] * rays[2] - position[2] * rays
    ground[2] = rays[2]
    return ground
