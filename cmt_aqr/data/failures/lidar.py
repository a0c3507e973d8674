"""Failures of the LiDAR: pure functions of points (P, 5), of a severity and of a random generator.

Functions of a *file* take x, y, z in metres in the sensor's own frame, intensity 0..255 and the ring index, as a
nuScenes .bin stores them: a key frame and every sweep by itself, before they are merged. Functions of *points* take the
merged points of a frame, whose fifth column is the time lag. No function changes its arguments.

*Source*: MultiCorrupt (Beemelmanns et al., 2402.11677), program `converter/lidar.py`; nuScenes-R (Yu et al.,
2205.14951) and its toolkit; MoME (CVPR 2025), which evaluates on six cases of the latter.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.data.gt_database import points_of_boxes

NUM_RINGS = 32
# Elevations of the beams in nuScenes-R's program, radians: the highest beam, the step from one beam to the next below,
# and the half step by which the border between two bins lies below a beam.
TOP_BEAM, BEAM_STEP, BEAM_SHIFT = 0.1862, 0.023275, 0.012
# Metres along x that a misaligned file is shifted, at every severity.
MISALIGNMENT = 2.0
# Fog: half-power width of the pulse (s), ranges between which the receiver begins to see the beam (m), differential
# reflectivity 1e-6 / pi of a hard target, and the noise of an echo's range (m). *Source*: Hahner et al., ICCV 2021.
PULSE_WIDTH, BLIND_RANGE, FULL_RANGE = 2e-8, 0.9, 1.0
TARGET_REFLECTIVITY = 1e-6 / math.pi
ECHO_NOISE = 10.0
SPEED_OF_LIGHT = 299_792_458.0


def elevation_bins(points: np.ndarray) -> np.ndarray:
    """The beam, 0 to 31 counted from the top, that each point belongs to by its elevation.

    Bin b reaches from b - 1 steps to b steps below the highest beam (0.1862 rad, steps of 0.023275 rad), with each
    border 0.012 rad lower, so that it encloses beam b. Points above or below all bins are in the outermost ones.

    Args:
        points: (P, >= 3) in the sensor's frame, metres.

    Returns:
        (P,) int64 in 0..31.

    *Source*: `reduce_LiDAR_beams` of nuScenes-R.
    """
    xyz = points[:, :3].astype(np.float64)
    distance = np.maximum(np.linalg.norm(xyz, axis=1), 1e-9)
    elevation = np.arcsin(np.clip(xyz[:, 2] / distance, -1, 1))
    steps = np.ceil((TOP_BEAM - BEAM_SHIFT - elevation) / BEAM_STEP)
    return np.clip(steps, 0, NUM_RINGS - 1).astype(np.int64)


def rings(points: np.ndarray) -> np.ndarray:
    """The ring index 0..31, 0 the lowest beam: column 5 of the file, else 31 - :func:`elevation_bins`.

    Column 5 is the ring index if all its values are whole numbers in 0..31 and they are not all the same.
    """
    column = points[:, 4] if points.shape[1] > 4 else np.zeros(len(points), np.float32)
    is_index = (column == np.floor(column)) & (column >= 0) & (column < NUM_RINGS)
    if is_index.all() and len(np.unique(column)) > 1:
        return column.astype(np.int64)
    return NUM_RINGS - 1 - elevation_bins(points)


def keep_beams(points: np.ndarray, num_beams: int, rng: np.random.Generator) -> np.ndarray:
    """A LiDAR with fewer beams. Of the 32 rings, 16 are 1, 3, .., 31; 8 are 1, 5, .., 29; 4 are 1, 9, 17, 25.

    Args:
        points: a file (P, 5).
        num_beams: 16, 8 or 4.

    *Source*: MultiCorrupt, beams reducing; severities 1, 2, 3 keep 16, 8, 4.
    """
    return points[rings(points) % (NUM_RINGS // num_beams) == 1]


def keep_elevations(points: np.ndarray, bins: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A LiDAR with fewer beams, which are found by elevation, not by the ring index.

    Args:
        points: a file (P, 5).
        bins: of :func:`elevation_bins` that are kept; 4 beams are 1, 9, 17, 25, one beam is 9.

    *Source*: nuScenes-R, beam reduction, as MoME evaluates it (4 beams).
    """
    return points[np.isin(elevation_bins(points), bins)]


def drop_share(points: np.ndarray, percent: int, rng: np.random.Generator) -> np.ndarray:
    """Points lost at random: round(P (100 - percent) / 100) of a random permutation stay.

    The permutation does not depend on the percentage: what is lost at 20 % is lost at 40 %, too.

    Args:
        points: a file (P, 5).
        percent: 20, 40 or 60.

    *Source*: MultiCorrupt, points reducing.
    """
    kept = rng.permutation(len(points))[: round(len(points) * (100 - percent) / 100)]
    return points[kept]


def shake(points: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A LiDAR in motion: one shift a file, N(0, s) along each axis, and a jitter of every point.

    The jitter is N(0, 0.15 s), N(0, 0.2 s), N(0, 0.12 s) along x, y, z, clipped at 3 s.

    Args:
        points: a file (P, 5).
        strength: s, metres: 0.06, 0.10, 0.13.

    *Source*: MultiCorrupt, motion blur of the LiDAR.
    """
    shift = rng.normal(0, strength, 3)
    jitter = rng.normal(0, 1, (len(points), 3)) * (0.15 * strength, 0.2 * strength, 0.12 * strength)
    return _moved(points, points[:, :3] + shift + np.clip(jitter, -3 * strength, 3 * strength))


def misalign(points: np.ndarray, severity: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A LiDAR that is mounted wrongly: with probability p a file is rotated by R_x R_y R_z and shifted by (2, 0, 0) m.

    Each rotation is by -s degrees about its axis, as in the program.

    Args:
        points: a file (P, 5).
        severity: p and s: (0.2, 1), (0.4, 2), (0.6, 3).

    *Source*: MultiCorrupt, spatial misalignment. The shift is 2 m at every severity.
    """
    probability, degrees = severity
    if rng.random() >= probability:
        return points
    return _moved(points, points[:, :3] @ misalignment_rotation(degrees).T + (MISALIGNMENT, 0, 0))


def misalignment_rotation(degrees: float) -> np.ndarray:
    """R_x R_y R_z (3, 3), each by -degrees about its axis."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    about_y = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    about_z = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


@lru_cache(maxsize=8)
def fog_echo(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Range and strength of the strongest echo of the fog itself, for targets at 0, 0.1, .., 200 m.

    The echo from range R is the integral over the pulse, t from 0 to 2 tau,
    sin^2(pi t / (2 tau)) exp(-2 alpha r) / r^2 xi(r) dt with r = R - c t / 2, where xi rises from 0 at 0.9 m to 1 at
    1 m and tau is 20 ns. The receiver takes the strongest echo at or before the target.

    Args:
        alpha: attenuation, 1/m.

    Returns:
        (2001,) range in metres and (2001,) strength in s/m^2, float64.

    *Source*: Hahner et al., Fog simulation on real LiDAR point clouds, equations 8 to 12.
    """
    ranges = np.arange(2001) * 0.1
    time = (np.arange(400) + 0.5) / 400 * 2 * PULSE_WIDTH
    way = ranges[:, None] - SPEED_OF_LIGHT * time / 2
    overlap = np.clip((way - BLIND_RANGE) / (FULL_RANGE - BLIND_RANGE), 0, 1)
    way = np.maximum(way, BLIND_RANGE)
    pulse = np.sin(np.pi * time / (2 * PULSE_WIDTH)) ** 2
    echo = (pulse * np.exp(-2 * alpha * way) / way**2 * overlap).mean(axis=1) * 2 * PULSE_WIDTH
    strongest = np.maximum.accumulate(echo)
    where = np.maximum.accumulate(np.where(echo >= strongest, np.arange(len(ranges)), 0))
    return ranges[where], strongest


def fog(points: np.ndarray, severity: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Fog between the LiDAR and its targets.

    The intensity i at range r becomes round(i exp(-2 alpha r)). The fog's own echo (:func:`fog_echo`) has the intensity
    i r^2 beta / beta_0 times its strength; where that is more, the point moves along its ray to the echo's range, times
    r / U(r - 10 m, r + 10 m), and takes the echo's intensity.

    Args:
        points: a file (P, 5).
        severity: its last two numbers, alpha (1/m) and beta (1/sr): (0.02, 0.008), (0.03, 0.008), (0.06, 0.05).

    *Source*: MultiCorrupt, fog on the LiDAR (after Hahner et al.). Its table of the integral is not published, so the
    formula is evaluated here. The lower end of the uniform range is at least 1 m here; the program can divide by 0.
    """
    alpha, beta = severity[-2:]
    distance = np.linalg.norm(points[:, :3].astype(np.float64), axis=1)
    ranges, strengths = fog_echo(alpha)
    entry = np.minimum(np.round(distance * 10), len(ranges) - 1).astype(np.int64)
    dimmed = np.round(np.exp(-2 * alpha * distance) * points[:, 3])
    echo = strengths[entry] * points[:, 3] * distance**2 * beta / TARGET_REFLECTIVITY
    noisy = rng.uniform(np.maximum(distance - ECHO_NOISE, 1.0), distance + ECHO_NOISE)
    is_fog = echo > dimmed
    # A point at the sensor has no direction; its echo, at distance 0, is never the stronger one.
    factor = np.where(is_fog, ranges[entry] / np.maximum(distance, 1e-9) * (distance / noisy), 1.0)
    result = _moved(points, points[:, :3] * factor[:, None])
    result[:, 3] = np.where(is_fog, echo, dimmed)
    return result


def blank_points(points: np.ndarray, boxes: Tensor, level: None, rng: np.random.Generator) -> np.ndarray:
    """No LiDAR: all points times 0, before the range filter, so that they fall into one voxel at the origin.

    Args:
        points: the merged points (P, 5).
        boxes: not used.

    *Source*: nuScenes-R and MoME, LiDAR drop; the same as `drop_lidar` in training (*Quirk Q17*).
    """
    return np.zeros_like(points)


def keep_sector(points: np.ndarray, boxes: Tensor, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """A LiDAR that looks ahead only: points whose direction seen from above is within +-degrees of +y.

    Args:
        points: the merged points (P, 5): sweeps are merged first.
        boxes: not used.
        degrees: 90 or 60.

    *Source*: nuScenes-R, limited field of view; MoME evaluates +-60.
    """
    direction = np.degrees(np.arctan2(points[:, 0], points[:, 1]))
    return points[np.abs(direction) <= degrees]


def drop_objects(points: np.ndarray, boxes: Tensor, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Objects that reflect nothing: with one probability per frame, the points in all ground-truth boxes are removed.

    Args:
        points: the merged points (P, 5).
        boxes: (G, 9), all of the frame.
        probability: 0.5.

    *Source*: nuScenes-R, LiDAR object failure, as MoME evaluates it.
    """
    if rng.random() >= probability or not len(boxes):
        return points
    kept = np.ones(len(points), dtype=bool)
    kept[torch.cat(points_of_boxes(torch.from_numpy(points), boxes)).numpy()] = False
    return points[kept]


def _moved(points: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """Points with other coordinates."""
    result = points.copy()
    result[:, :3] = xyz
    return result
