"""What is wrong with the light, the weather or a sensor in one scene."""

from dataclasses import dataclass

import numpy as np

from cmt_aqr.synthetic.calibration import CAMERA_CHANNELS

LIGHTS = ("day", "dusk", "night")
WEATHERS = ("clear", "rain", "fog")
NONE = "none"

LIGHT_SHARES = (0.75, 0.10, 0.15)
WEATHER_SHARES = (0.80, 0.12, 0.08)
FAULT_SHARE = 0.08
"""Probability of each of: glare on one camera, dirt on one lens, one blinded LiDAR sector."""

BLIND_WIDTH_DEG = (40, 110)

_STRIDES = 1.134724 ** -np.arange(1.0, 6.0)
"""Powers of the inverse of the root of x^6 = x + 1, whose multiples fill the five-dimensional unit cube evenly."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of one scene; the defaults are a clear day with healthy sensors.

    camera_glare and camera_dirt name a camera channel or "none". lidar_blind is None or (start, width) in whole
    degrees: azimuth in the LiDAR frame, counter-clockwise from its x axis (which points right), start in 0..359.
    """

    light: str = "day"
    weather: str = "clear"
    camera_glare: str = NONE
    camera_dirt: str = NONE
    lidar_blind: tuple[int, int] | None = None

    def describe(self) -> str:
        """The scene description: machine-readable "key=value" words separated by "; "."""
        blind = NONE if self.lidar_blind is None else f"{self.lidar_blind[0]}+{self.lidar_blind[1]}deg"
        return (
            f"synthetic; light={self.light}; weather={self.weather}; camera_glare={self.camera_glare}; "
            f"camera_dirt={self.camera_dirt}; lidar_blind={blind}"
        )


def parse_conditions(description: str) -> Conditions:
    """Conditions back from what Conditions.describe wrote. Raises ValueError when a word is missing or malformed."""
    words = dict(word.split("=", 1) for word in description.split("; ") if "=" in word)
    try:
        blind = words["lidar_blind"]
        sector = None
        if blind != NONE:
            start, width = blind.removesuffix("deg").split("+")
            sector = (int(start), int(width))
        return Conditions(words["light"], words["weather"], words["camera_glare"], words["camera_dirt"], sector)
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a synthetic scene description ({error}): {description!r}") from error


def draw_conditions(seed: int, index: int) -> Conditions:
    """Conditions of scene index of a world: about half of the scenes are a clear day with healthy sensors.

    Over consecutive scenes each kind keeps its share closely (an additive recurrence, not independent draws), so that
    also a few validation scenes are a fair mixture.
    """
    offset = np.random.default_rng([seed, 8]).random(len(_STRIDES))
    light, weather, *faults = ((offset + index * _STRIDES) % 1.0).tolist()
    rng = np.random.default_rng([seed, index, 9])
    cameras = rng.integers(0, len(CAMERA_CHANNELS), 2)
    start, width = int(rng.integers(0, 360)), int(rng.integers(*BLIND_WIDTH_DEG))
    has_glare, has_dirt, has_blind = (fault < FAULT_SHARE for fault in faults)
    return Conditions(
        light=_pick(LIGHTS, LIGHT_SHARES, light),
        weather=_pick(WEATHERS, WEATHER_SHARES, weather),
        camera_glare=CAMERA_CHANNELS[cameras[0]] if has_glare else NONE,
        camera_dirt=CAMERA_CHANNELS[cameras[1]] if has_dirt else NONE,
        lidar_blind=(start, width) if has_blind else None,
    )


def _pick(names: tuple[str, ...], shares: tuple[float, ...], at: float) -> str:
    return names[int(np.searchsorted(np.cumsum(shares)[:-1], at, side="right"))]
