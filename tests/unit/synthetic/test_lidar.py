"""The point files against the shapes, by independent means: the devkit, and a three-dimensional ray caster."""

import numpy as np
import pytest

from cmt_aqr.synthetic import Conditions
from cmt_aqr.synthetic.lidar import FROM_AIR, NOISE_LIMIT, Lidar, parts_in_sensor_frame
from cmt_aqr.synthetic.raycast import BEAM_SLOPE, BEAMS, RayCaster, column_azimuth
from cmt_aqr.synthetic.recording import lidar_pose, parts_of
from cmt_aqr.synthetic.scenes import build_scene
from tests.unit.synthetic.conftest import SETTINGS

HEIGHT = 1.84023


def scene_of(nusc, number):
    """The Scene behind the number-th row of the scene table, and the time stamp of its first key frame."""
    index = number if number < SETTINGS["scenes"] else 100_000
    first = nusc.get("sample", nusc.scene[number]["first_sample_token"])["timestamp"]
    return build_scene(SETTINGS["seed"], index, SETTINGS["samples_per_scene"]), first


def to_global(nusc, data):
    """Points (n, 5) of a sample_data row and their matrix (4, 4) to the global frame, as the devkit composes it."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    matrix = np.eye(4)
    for table, key in (("ego_pose", "ego_pose_token"), ("calibrated_sensor", "calibrated_sensor_token")):
        row = nusc.get(table, data[key])
        matrix = matrix @ transform_matrix(row["translation"], Quaternion(row["rotation"]))
    return np.fromfile(f"{nusc.dataroot}/{data['filename']}", dtype=np.float32).reshape(-1, 5), matrix


def cast(origin, rays, parts, poses):
    """Distances (n,) along unit rays (n, 3) from origin (3,) to the first of oriented boxes or the ground z = 0."""
    best = np.where(rays[:, 2] < 0, -origin[2] / np.minimum(rays[:, 2], -1e-9), np.inf)
    for part, (x, y, yaw) in zip(parts, poses, strict=True):
        turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        start, ray = turn @ (origin - [x, y, 0]), rays @ turn.T
        low = np.array([part[0] - part[2], part[1] - part[3], part[4]])
        high = np.array([part[0] + part[2], part[1] + part[3], part[5]])
        with np.errstate(divide="ignore"):
            a, b = (low - start) / ray, (high - start) / ray
        near, far = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
        best = np.where((near <= far) & (near > 0), np.minimum(best, near), best)
    return best


def test_box_counts_equal_the_devkits(nusc):
    from nuscenes.utils.geometry_utils import points_in_box

    compared = 0
    for sample in nusc.sample:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, :3].T
        for box in boxes:
            expected = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            assert points_in_box(box, points).sum() == expected, (box.name, box.center)
            compared += expected > 0
    assert compared > 300


@pytest.mark.parametrize("back", [0, 4])
def test_points_are_where_a_brute_force_ray_caster_puts_them(nusc, back):
    """back: turns before the key frame, so that objects and ego at the turn's own time are meant, not the sample's."""
    for number in range(len(nusc.scene)):
        scene, start = scene_of(nusc, number)
        sample = nusc.get("sample", nusc.scene[number]["last_sample_token"])
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        for _ in range(back):
            data = nusc.get("sample_data", data["prev"])
        points, matrix = to_global(nusc, data)
        local = points[np.linalg.norm(points[:, :2], axis=1) > 4.0, :3]  # beyond the ego's own body
        local = local[np.random.default_rng(0).choice(len(local), 500, replace=False)].astype(np.float64)
        time = (data["timestamp"] - start) * 1e-6
        actors = scene.nearby(time)
        chosen, slot = parts_of(scene, actors)
        distance = np.linalg.norm(local, axis=1)
        rays = (local / distance[:, None]) @ matrix[:3, :3].T
        expected = cast(matrix[:3, 3], rays, scene.parts[chosen], scene.poses(np.array([time]), actors)[0][slot])
        assert np.allclose(matrix[:3, 2], [0, 0, 1])
        error = np.abs(distance - expected)
        if scene.conditions.weather == "clear":
            # A ray that just touches an edge may go either way in single precision.
            assert (error < NOISE_LIMIT + 1e-3).mean() > 0.99
            assert np.median(error) < 0.02
        else:
            assert (error < NOISE_LIMIT + 1e-3).mean() > 0.9


def test_beams_and_columns_are_those_of_the_sensor(nusc):
    for data in nusc.sample_data:
        if data["channel"] != "LIDAR_TOP" or not data["is_key_frame"]:
            continue
        points, _ = to_global(nusc, data)
        assert np.isfinite(points).all()
        assert 12_000 < len(points) < 1084 * 32
        elevation = np.rad2deg(np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1])))
        assert np.abs(elevation - np.linspace(-30.67, 10.67, 32)[points[:, 4].astype(int)]).max() < 1e-3
        azimuth = np.rad2deg(np.arctan2(points[:, 1], points[:, 0]))
        assert azimuth[0] > 170 and azimuth[-1] < -170  # starts on the left, turns clockwise
        assert np.all(np.diff(azimuth) < 1e-3)
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255 and np.ptp(points[:, 3]) > 30
        assert np.array_equal(points[:, 3], np.floor(points[:, 3]))


def test_turns_compensated_by_ego_motion_line_up_on_a_wall(nusc):
    from nuscenes.utils.data_classes import LidarPointCloud

    for number in range(len(nusc.scene)):
        scene, start = scene_of(nusc, number)
        sample = nusc.get("sample", nusc.scene[number]["last_sample_token"])
        time = (sample["timestamp"] - start) * 1e-6
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        _, matrix = to_global(nusc, data)
        cloud, lag = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=10)
        points = (matrix @ np.vstack([cloud.points[:3], np.ones(cloud.nbr_points())]))[:3].T
        houses = np.flatnonzero((scene.label < 0) & (np.abs(scene.lateral) > 18.5))
        on_wall = []
        for house, (x, y, yaw) in zip(houses, scene.poses(np.array([time]), houses)[0], strict=True):
            part = scene.parts[scene.part_actor == house][0]
            along = (points[:, 0] - x) * np.cos(yaw) + (points[:, 1] - y) * np.sin(yaw)
            front = (points[:, 1] - y) * np.cos(yaw) - (points[:, 0] - x) * np.sin(yaw) + part[3]
            near = (np.abs(along) < part[2] - 0.5) & (np.abs(front) < 0.3) & (points[:, 2] > 2.0)
            on_wall.append(np.stack([front[near], lag[0][near]]))
        front, lag = np.concatenate(on_wall, axis=1)
        old = lag > 0.4
        assert old.sum() > 200
        assert np.abs(front[old]).max() < NOISE_LIMIT + 1e-3
        assert abs(front[old].mean() - front[lag == 0].mean()) < 2e-3


@pytest.fixture(scope="module")
def street():
    scene = build_scene(3, 0, 4)
    actors = scene.nearby(0.5)
    chosen, slot = parts_of(scene, actors)
    poses = scene.poses(np.array([0.5]), actors)[0][slot]
    parts = parts_in_sensor_frame(scene.parts[chosen], poses, lidar_pose(scene.ego_pose(0.5)))
    return parts, scene.part_reflectivity[chosen]


def nearest(crossings, columns):
    """Horizontal distance of the nearest crossing of every ray, inf where there is none."""
    cell, distance, _ = crossings
    out = np.full(columns * BEAMS, np.inf, dtype=np.float32)
    np.minimum.at(out, cell, distance)
    return out


def test_every_ray_meets_the_box_that_brute_force_says(street):
    """Without noise, and for turns on different ground at once: each box once more, nearer, farther, low and high."""
    columns, origin = 360, np.array([0, 0, HEIGHT])
    turned = street[0] * [-1, -1, 1, 1, 1, 1, 1]
    azimuth = np.repeat(column_azimuth(columns), BEAMS)
    rays = np.stack([np.cos(azimuth), np.sin(azimuth), np.tile(BEAM_SLOPE.astype(float), columns)], -1)
    length = np.linalg.norm(rays, axis=1)
    turns = list(RayCaster(columns, HEIGHT).crossings(np.stack([street[0], turned])))
    for parts, crossings in zip((street[0], turned), turns, strict=True):
        shapes = np.column_stack([np.zeros((len(parts), 2)), parts[:, 3:]])
        ground = np.where(rays[:, 2] < 0, -HEIGHT / np.minimum(rays[:, 2], -1e-9), np.inf)
        expected = cast(origin, rays / length[:, None], shapes, parts[:, :3]) / length
        found = np.minimum(nearest(crossings, columns), ground)
        hit = np.isfinite(expected)
        assert hit.mean() > 0.8 and (expected < 0.99 * ground).mean() > 0.2
        # A ray that just touches an edge may go either way in single precision.
        agrees = np.where(hit, np.abs(found - np.where(hit, expected, 0)) < 1e-3, ~np.isfinite(found))
        assert agrees.mean() > 0.999
        alone = next(RayCaster(columns, HEIGHT).crossings(parts[None]))
        assert all(np.array_equal(a, b) for a, b in zip(crossings, alone, strict=True))


def test_no_two_turns_have_the_same_noise(street):
    parts, reflectivity = street
    lidar = Lidar(1084, Conditions())
    first, second = lidar.scans(np.stack([parts, parts]), reflectivity, np.random.default_rng(0))
    assert len(first.points) != len(second.points)
    cells = np.intersect1d(first.kept, second.kept)
    a, b = (turn.points[np.isin(turn.kept, cells)] for turn in (first, second))
    difference = np.linalg.norm(a[:, :3], axis=1) - np.linalg.norm(b[:, :3], axis=1)
    assert np.abs(difference).max() < 2 * NOISE_LIMIT + 1e-3
    assert difference.std() == pytest.approx(0.012 * np.sqrt(2), rel=0.05)
    assert abs(np.corrcoef(difference[1:], difference[:-1])[0, 1]) < 0.03


def scan(street, **conditions):
    return Lidar(1084, Conditions(**conditions)).scan(*street, np.random.default_rng(1))


def test_a_blinded_sector_is_empty_and_the_rest_is_not(street):
    whole, blind = scan(street), scan(street, lidar_blind=(340, 50))
    azimuth = [np.rad2deg(np.arctan2(s.points[:, 1], s.points[:, 0])) % 360 for s in (whole, blind)]
    inside = [(a > 340.2) | (a < 29.8) for a in azimuth]
    assert inside[0].sum() > 1500 and inside[1].sum() == 0
    outside = [(a > 30.2) & (a < 339.8) for a in azimuth]
    assert np.array_equal(whole.points[outside[0]], blind.points[outside[1]])


def test_rain_and_fog_shorten_the_range_and_put_points_in_the_air(street):
    far = {}
    for weather in ("clear", "rain", "fog"):
        result = scan(street, weather=weather)
        distance = np.linalg.norm(result.points[:, :3], axis=1)
        far[weather] = (distance > 35).sum()
        ghosts = (result.part == FROM_AIR).sum()
        assert (ghosts == 0) == (weather == "clear")
    assert far["clear"] > 1.2 * far["rain"] > 3 * far["fog"]
    assert far["fog"] < 0.2 * far["clear"]
