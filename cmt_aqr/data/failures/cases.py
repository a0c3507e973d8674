"""The failures by name: which function each calls, its severities, and where it comes from.

``CASES`` is the only table: the command line, the suites, the documentation and training read it. A new failure is a
function beside the others and an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cmt_aqr.data.failures import calibration, cameras, lidar, timing, weather

Protocol = Literal["MultiCorrupt", "nuScenes-R"]


@dataclass(frozen=True)
class Case:
    """One kind of failure: what it does to each kind of data of a frame; None leaves that kind unchanged.

    Attributes:
        source: the protocol that defines it.
        about: what fails, in a few words for tables and pictures.
        levels: name of a severity -> its parameter, mildest first; a case without severities has one, named "".
        image: (image, parameter, rng) -> image, for every camera's file.
        sweep: (points, parameter, rng) -> points, for every LiDAR file.
        points: (points, boxes, parameter, rng) -> points, for the merged points of a frame.
        calibration: see :func:`cmt_aqr.data.failures.calibration.disturb`.
        delay: (history, parameter, coin) -> key frames back, for the sensors in ``delayed``.
        delayed: ``lidar``, ``camera`` or both.
        takes_views: whether a level may also name the cameras that fail.
        bare: levels that a name without a level means; default: all.
    """

    source: Protocol
    about: str
    levels: Mapping[str, Any] = field(default_factory=lambda: {"": None})
    image: Callable | None = None
    sweep: Callable | None = None
    points: Callable | None = None
    calibration: Callable | None = None
    delay: Callable | None = None
    delayed: tuple[str, ...] = ()
    takes_views: bool = False
    bare: tuple[str, ...] = ()

    @property
    def sensors(self) -> tuple[str, ...]:
        """Which of ``lidar`` and ``camera`` it affects."""
        changes = {"lidar": self.sweep or self.points, "camera": self.image or self.calibration}
        return tuple(name for name, change in changes.items() if change or name in self.delayed)


_SHARES = {str(percent): percent / 100 for percent in range(10, 100, 10)}
_THIRDS = {"1": 0.2, "2": 0.4, "3": 0.6}

CASES: dict[str, Case] = {
    "beams": Case("MultiCorrupt", "LiDAR with fewer beams", {"16": 16, "8": 8, "4": 4}, sweep=lidar.keep_beams),
    "brightness": Case("MultiCorrupt", "images too bright", {"1": 0.1, "2": 0.3, "3": 0.5}, image=cameras.brighten),
    "darkness": Case(
        "MultiCorrupt",
        "images too dark, noisy",
        {"1": (0.60, 25, 0.08), "2": (0.40, 12, 0.18), "3": (0.30, 5, 0.26)},
        image=cameras.darken,
    ),
    "fog": Case(
        "MultiCorrupt",
        "fog",
        {"1": (2, 0.0005, 0.02, 0.008), "2": (3, 0.001, 0.03, 0.008), "3": (4, 0.002, 0.06, 0.05)},
        image=weather.fog,
        sweep=lidar.fog,
    ),
    "missing_camera": Case("MultiCorrupt", "some images black", _THIRDS, image=cameras.blacken_some),
    "motion": Case(
        "MultiCorrupt",
        "motion blur, LiDAR jitter",
        {"1": 0.06, "2": 0.10, "3": 0.13},
        image=cameras.blur,
        sweep=lidar.shake,
    ),
    "points": Case("MultiCorrupt", "LiDAR points lost (%)", {"20": 20, "40": 40, "60": 60}, sweep=lidar.drop_share),
    "snow": Case(
        "MultiCorrupt",
        "snow in the images",
        {"1": (0.3, 5, 0.9, 7, 7, 0.9), "2": (0.4, 4, 0.85, 8, 8, 0.85), "3": (0.5, 3, 0.8, 10, 10, 0.8)},
        image=weather.snow,
    ),
    "spatial": Case(
        "MultiCorrupt",
        "LiDAR misaligned in space",
        {"1": (0.2, 1), "2": (0.4, 2), "3": (0.6, 3)},
        sweep=lidar.misalign,
    ),
    "temporal": Case(
        "MultiCorrupt", "data of the previous key frame", _THIRDS, delay=timing.previous, delayed=("lidar", "camera")
    ),
    "lidar_drop": Case("nuScenes-R", "no LiDAR", points=lidar.blank_points),
    "camera_drop": Case("nuScenes-R", "all images black", image=cameras.blacken),
    "view_drop": Case("nuScenes-R", "named cameras black", {"all": None}, image=cameras.blacken, takes_views=True),
    "fov": Case("nuScenes-R", "LiDAR looks ahead only (+- degrees)", {"90": 90, "60": 60}, points=lidar.keep_sector),
    "elevation_beams": Case(
        "nuScenes-R",
        "LiDAR with fewer beams, by elevation",
        {"4": (1, 9, 17, 25), "1": (9,)},
        sweep=lidar.keep_elevations,
    ),
    "object_failure": Case("nuScenes-R", "objects reflect nothing", {"": 0.5}, points=lidar.drop_objects),
    "occlusion": Case("nuScenes-R", "dirt on the lenses", image=cameras.soil),
    "stuck_lidar": Case(
        "nuScenes-R",
        "LiDAR one key frame late (% of frames)",
        _SHARES,
        delay=timing.previous,
        delayed=("lidar",),
        bare=("50",),
    ),
    "stuck_cameras": Case(
        "nuScenes-R",
        "cameras one key frame late (% of frames)",
        _SHARES,
        delay=timing.previous,
        delayed=("camera",),
        bare=("50",),
    ),
    "frozen_lidar": Case(
        "nuScenes-R",
        "LiDAR frozen for 4 key frames (% of frames)",
        _SHARES,
        delay=timing.stuck_run,
        delayed=("lidar",),
        bare=("50",),
    ),
    "frozen_cameras": Case(
        "nuScenes-R",
        "cameras frozen for 4 key frames (% of frames)",
        _SHARES,
        delay=timing.stuck_run,
        delayed=("camera",),
        bare=("50",),
    ),
    "calibration_noise": Case(
        "nuScenes-R",
        "camera poses wrong",
        {"single": "single", "all": "all"},
        calibration=calibration.disturb,
        takes_views=True,
        bare=("single",),
    ),
}

SUITES: dict[str, tuple[str, ...]] = {
    "multicorrupt": tuple(name for name, case in CASES.items() if case.source == "MultiCorrupt"),
    "mome": ("elevation_beams:4", "lidar_drop", "fov:60", "object_failure", "view_drop", "occlusion"),
    "all": tuple(name for name in CASES if name != "camera_drop"),  # the same as view_drop
}
# Left out of mRA: MultiCorrupt's snow also acts on the LiDAR, which ours does not, so the scores cannot be compared.
OUTSIDE_MRA = ("snow",)
