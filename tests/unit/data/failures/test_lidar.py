"""Failures of the LiDAR, counted by hand: on made-up points always, on the real frame where it is there."""

import math

import numpy as np
import pytest
import torch

from cmt_aqr.data.failures import lidar


def ring_points(ring_of: bool = True) -> np.ndarray:
    """32 beams at the elevations of an HDL-32E, five points each at several ranges, a metre to a hundred."""
    rows = []
    for ring in range(32):
        elevation = math.radians(-30.67 + ring * 4 / 3)
        for azimuth, distance in ((0.1, 2), (1.4, 9), (2.9, 30), (-1.0, 55), (-2.5, 99)):
            ground = distance * math.cos(elevation)
            x, y, z = ground * math.cos(azimuth), ground * math.sin(azimuth), distance * math.sin(elevation)
            rows.append((x, y, z, 40.0, ring if ring_of else 0.0))
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    ("beams", "kept"),
    ((16, range(1, 32, 2)), (8, (1, 5, 9, 13, 17, 21, 25, 29)), (4, (1, 9, 17, 25))),
)
def test_beams_by_ring_index(rng, beams, kept):
    found = lidar.keep_beams(ring_points(), beams, rng)
    assert sorted(set(found[:, 4].astype(int))) == list(kept) and len(found) == 5 * len(kept)


def test_beams_without_a_ring_index_are_those_of_the_elevations(rng):
    with_index, without = ring_points(), ring_points(False)
    assert np.array_equal(lidar.rings(without), with_index[:, 4].astype(int))
    expected = lidar.keep_beams(with_index, 4, rng)
    assert np.array_equal(lidar.keep_beams(without, 4, rng)[:, :3], expected[:, :3])
    # Any other fifth column is no ring index either.
    for column in (np.full(160, 31.0), np.linspace(0, 31, 160), np.arange(160.0)):
        changed = without.copy()
        changed[:, 4] = column
        assert np.array_equal(lidar.rings(changed), with_index[:, 4].astype(int))
    # An index is believed even where it contradicts the elevations.
    turned = with_index.copy()
    turned[:, 4] = 31 - turned[:, 4]
    assert np.array_equal(lidar.rings(turned), 31 - with_index[:, 4].astype(int))


def test_elevations_of_all_bins(rng):
    bins = lidar.elevation_bins(ring_points()).reshape(32, 5)
    assert (bins == (31 - np.arange(32))[:, None]).all()
    beyond = np.array([[0, 0, 9, 0, 0], [0, 0, -9, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    assert lidar.elevation_bins(beyond).tolist() == [0, 31, 8]
    # The borders of bin 9, 8 and 9 steps below the highest beam and 0.012 lower.
    for elevation, inside in ((-0.01201, True), (-0.01199, False), (-0.03527, True), (-0.03529, False)):
        point = np.array([[10 * math.cos(elevation), 0, 10 * math.sin(elevation), 1, 1]], np.float64)
        assert (lidar.elevation_bins(point)[0] == 9) == inside, elevation
    assert len(lidar.keep_elevations(ring_points(), (9,), rng)) == 5


def test_a_share_of_points_is_lost_and_the_milder_loss_is_part_of_the_harder(rng):
    points = ring_points()
    kept = [lidar.drop_share(points, percent, np.random.default_rng(2)) for percent in (20, 40, 60)]
    assert [len(p) for p in kept] == [128, 96, 64]
    sets = [{tuple(row) for row in p} for p in kept]
    assert sets[2] < sets[1] < sets[0] < {tuple(row) for row in points}
    assert {tuple(row) for row in lidar.drop_share(points, 20, rng)} != sets[0]


def test_motion_shifts_the_file_and_jitters_its_points():
    points = np.tile(ring_points(), (100, 1))
    shifts, spread = [], []
    for seed in range(60):
        moved = lidar.shake(points, 0.1, np.random.default_rng(seed))
        assert np.array_equal(moved[:, 3:], points[:, 3:])
        offset = (moved - points)[:, :3]
        shifts.append(offset.mean(axis=0))
        spread.append(offset.std(axis=0))
    assert np.std(shifts, axis=0) == pytest.approx([0.1] * 3, rel=0.3)
    assert np.mean(spread, axis=0) == pytest.approx([0.015, 0.02, 0.012], rel=0.02)
    assert np.abs(offset - shifts[-1]).max() < 3 * 0.1 + 0.01


def test_misalignment_turns_by_hand(rng):
    # 90 degrees a turn: about z x -> -y, about y -y stays, about x -y -> z; y -> x -> z -> y; z -> z -> -x -> -x.
    turn = lidar.misalignment_rotation(90)
    assert turn @ (1, 0, 0) == pytest.approx((0, 0, 1), abs=1e-12)
    assert turn @ (0, 0, 1) == pytest.approx((-1, 0, 0), abs=1e-12)
    assert turn @ (0, 1, 0) == pytest.approx((0, 1, 0), abs=1e-12)
    points = ring_points()
    moved = lidar.misalign(points, (1.0, 3), rng)
    back = (moved[:, :3] - (2, 0, 0)) @ lidar.misalignment_rotation(3)
    assert np.abs(back - points[:, :3]).max() < 1e-4
    # Three turns by 3 degrees about perpendicular axes are one by about sqrt(3) 3 degrees.
    angle = math.degrees(math.acos((np.trace(lidar.misalignment_rotation(3)) - 1) / 2))
    assert angle == pytest.approx(3 * math.sqrt(3), abs=0.1)
    unmoved = [lidar.misalign(points, (0.2, 1), np.random.default_rng(s)) is points for s in range(300)]
    assert 0.72 < np.mean(unmoved) < 0.88


def fog_echo_by_quadrature(alpha: float, target: float) -> tuple[float, float]:
    """Range and strength of the strongest echo before a target, by sums written out plainly."""
    best = (0.0, 0.0)
    for step in range(round(target * 10) + 1):
        distance, total = step / 10, 0.0
        for i in range(2000):
            time = (i + 0.5) * 4e-8 / 2000
            way = distance - 299792458.0 * time / 2
            if way > 0.9:
                overlap = min((way - 0.9) / 0.1, 1.0)
                total += math.sin(math.pi * time / 4e-8) ** 2 * math.exp(-2 * alpha * way) / way**2 * overlap
        best = max(best, (total * 4e-8 / 2000, distance))
    return best[1], best[0]


def test_the_echo_of_fog():
    ranges, strengths = lidar.fog_echo(0.06)
    for target in (2.0, 5.0, 20.0):
        distance, strength = fog_echo_by_quadrature(0.06, target)
        assert ranges[round(target * 10)] == pytest.approx(distance, abs=0.11)
        assert strengths[round(target * 10)] == pytest.approx(strength, rel=0.01)
    assert (np.diff(strengths) >= 0).all() and ranges[-1] < 8


def test_fog_dims_or_replaces_every_point(rng):
    points = ring_points()
    foggy = lidar.fog(points, (0.06, 0.05), rng)
    distance = np.linalg.norm(points[:, :3], axis=1).astype(float)
    is_moved = np.abs(foggy[:, :3] - points[:, :3]).max(axis=1) > 0
    assert np.array_equal(foggy[~is_moved, 3], np.round(40 * np.exp(-0.12 * distance[~is_moved])))
    assert set(distance[~is_moved].round()) == {2, 9} and set(distance[is_moved].round()) == {30, 55, 99}
    strength = lidar.fog_echo(0.06)[1][np.round(distance * 10).astype(int)]
    echo = strength * 40 * distance**2 * 0.05 / (1e-6 / math.pi)
    assert foggy[is_moved, 3] == pytest.approx(echo[is_moved], rel=1e-5)
    new = np.linalg.norm(foggy[:, :3], axis=1)[is_moved]
    base = lidar.fog_echo(0.06)[0][300] * distance[is_moved]
    assert (new >= base / (distance[is_moved] + 10) - 1e-3).all()
    assert (new <= base / (distance[is_moved] - 10) + 1e-3).all()
    directions = np.cross(foggy[:, :3], points[:, :3]) / distance[:, None] ** 2
    assert np.abs(directions).max() < 1e-5
    thin = lidar.fog(points, (0.02, 0.008), rng)
    assert (np.abs(thin[:, :3] - points[:, :3]).max(axis=1) > 0).sum() < is_moved.sum()


def test_no_lidar_is_a_heap_of_zeros(rng):
    points = ring_points()
    blank = lidar.blank_points(points, torch.zeros(0, 9), None, rng)
    assert blank.shape == points.shape and not blank.any() and points.any()


def test_a_sector_ahead_counts_as_a_half_plane_and_a_wedge(rng):
    generator = np.random.default_rng(3)
    points = np.concatenate((generator.uniform(-50, 50, (5000, 3)), np.zeros((5000, 2))), axis=1).astype(np.float32)
    boxes = torch.zeros(0, 9)
    ahead, wedge = (lidar.keep_sector(points, boxes, degrees, rng) for degrees in (90, 60))
    x, y = points[:, 0], points[:, 1]
    assert len(ahead) == (y >= 0).sum() and (ahead[:, 1] >= 0).all()
    assert len(wedge) == (y >= np.abs(x) / math.tan(math.radians(60))).sum()


def test_objects_vanish_by_a_coin(rng):
    points = np.array([[10, 0, 0, 1, 0], [10.9, 0.4, 0, 1, 0], [12, 0, 0, 1, 0], [-5, 5, 0, 1, 0]], np.float32)
    boxes = torch.tensor([[10, 0, 0, 2, 1, 2, 0, 0, 0], [-5, 5, 0, 1, 1, 1, 0.3, 0, 0]])
    assert lidar.drop_objects(points, boxes, 1.0, rng)[:, 0].tolist() == [12]
    assert lidar.drop_objects(points, boxes, 0.0, rng) is points
    assert lidar.drop_objects(points, torch.zeros(0, 9), 1.0, rng) is points
    heads = [len(lidar.drop_objects(points, boxes, 0.5, np.random.default_rng(seed))) == 1 for seed in range(200)]
    assert 0.4 < np.mean(heads) < 0.6


@pytest.mark.data
def test_real_beams(real_cloud, rng):
    """The HDL-32E fires 1084 times a turn and the file keeps every return."""
    assert len(real_cloud) == 32 * 1084
    assert [len(lidar.keep_beams(real_cloud, beams, rng)) for beams in (16, 8, 4)] == [17344, 8672, 4336]
    assert (np.bincount(lidar.rings(real_cloud)) == 1084).all()


@pytest.mark.data
def test_real_elevations(real_cloud, rng):
    """Bins by the slope z / ground range, and, away from the own vehicle, against the ring index of the file."""
    ground = np.hypot(real_cloud[:, 0], real_cloud[:, 1]).astype(float)
    count = 0
    for number in (1, 9, 17, 25):
        low, high = (math.tan(0.1862 - 0.012 - 0.023275 * steps) for steps in (number, number - 1))
        count += ((real_cloud[:, 2] > low * ground) & (real_cloud[:, 2] <= high * ground)).sum()
    assert len(lidar.keep_elevations(real_cloud, (1, 9, 17, 25), rng)) == count
    far = ground > 3
    # The published bins are 0.4 mrad off their middle: a tenth of the points falls into the neighbouring beam.
    away = np.abs((31 - lidar.elevation_bins(real_cloud)) - real_cloud[:, 4])[far]
    assert (away == 0).mean() == pytest.approx(0.9, abs=0.01) and (away > 1).mean() < 1e-3


@pytest.mark.data
def test_real_shares_sector_and_objects(real_cloud, real, rng):
    assert [len(lidar.drop_share(real_cloud, percent, rng)) for percent in (20, 40, 60)] == [27750, 20813, 13875]
    boxes = real.targets("all").boxes
    x, y = real_cloud[:, 0].astype(float), real_cloud[:, 1].astype(float)
    assert len(lidar.keep_sector(real_cloud, boxes, 90, rng)) == (y >= 0).sum()
    assert len(lidar.keep_sector(real_cloud, boxes, 60, rng)) == (y >= np.abs(x) / math.sqrt(3)).sum()
    inside = np.zeros(len(real_cloud), bool)
    for cx, cy, cz, length, width, height, yaw in boxes[:, :7].double().tolist():
        along = (x - cx) * math.cos(yaw) + (y - cy) * math.sin(yaw)
        across = (y - cy) * math.cos(yaw) - (x - cx) * math.sin(yaw)
        above = real_cloud[:, 2].astype(float) - cz
        inside |= (abs(along) <= length / 2) & (abs(across) <= width / 2) & (abs(above) <= height / 2)
    left = lidar.drop_objects(real_cloud, boxes, 1.0, rng)
    assert len(real_cloud) - len(left) == inside.sum() == 984
    # The tables count 999 in boxes that are upright on the map; in the LiDAR's frame they lean by 2 degrees.
    assert sum(real.num_lidar_points) == 999


@pytest.mark.data
def test_real_fog_and_motion(real_cloud, rng):
    distance = np.linalg.norm(real_cloud[:, :3], axis=1).astype(float)
    foggy = lidar.fog(real_cloud, (0.02, 0.008), rng)
    is_moved = (foggy[:, :3] != real_cloud[:, :3]).any(axis=1)
    dimmed = np.round(real_cloud[:, 3] * np.exp(-0.04 * distance))
    assert np.array_equal(foggy[~is_moved, 3], dimmed[~is_moved]) and 0.02 < is_moved.mean() < 0.5
    assert distance[is_moved].min() > 20 or (dimmed[is_moved] <= 1).any()
    moved = lidar.shake(real_cloud, 0.13, rng) - real_cloud
    assert moved[:, :3].std(axis=0) == pytest.approx([0.13 * 0.15, 0.13 * 0.2, 0.13 * 0.12], rel=0.02)
