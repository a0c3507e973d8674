"""The street itself: motion, and nobody inside anybody else."""

import numpy as np
import pytest

from cmt_aqr.classes import CLASSES
from cmt_aqr.synthetic import parse_conditions
from cmt_aqr.synthetic.conditions import Conditions, draw_conditions
from cmt_aqr.synthetic.scenes import NO_LABEL, build_scene
from tests.unit.synthetic.conftest import SETTINGS
from tests.unit.synthetic.test_lidar import scene_of


def test_box_velocity_is_the_motion_models(nusc):
    checked = 0
    for number in range(len(nusc.scene)):
        scene, start = scene_of(nusc, number)
        everyone = np.arange(len(scene.s))
        for sample in (row for row in nusc.sample if row["scene_token"] == nusc.scene[number]["token"]):
            time = (sample["timestamp"] - start) * 1e-6
            poses = scene.poses(np.array([time]), everyone)[0]
            exact = scene.velocities(np.array([time]), everyone)[0]
            for token in sample["anns"]:
                row = nusc.get("sample_annotation", token)
                actor = np.argmin(np.hypot(*(poses[:, :2] - row["translation"][:2]).T))
                assert np.allclose(poses[actor, :2], row["translation"][:2], atol=2e-5)
                assert row["translation"][2] == pytest.approx(0.03 + row["size"][2] / 2, abs=1e-4)
                if row["prev"] and row["next"]:
                    velocity = nusc.box_velocity(token)[:2]
                    # Central differences over one second; traffic brakes by up to 3 m/s^2 and turns.
                    assert np.abs(velocity - exact[actor]).max() < 0.9
                    checked += 1
    assert checked > 300


def test_velocity_is_the_derivative_of_the_position():
    scene = build_scene(5, 1, 20)
    everyone, step = np.arange(len(scene.s)), 1e-3
    for time in (0.3, 4.01, 8.7):
        before, after = scene.poses(np.array([time - step, time + step]), everyone)[..., :2]
        difference = (after - before) / (2 * step)
        assert np.abs(difference - scene.velocities(np.array([time]), everyone)[0]).max() < 0.02


def test_the_ego_curves_and_changes_speed():
    swings, turns = [], []
    for index in range(4):
        scene = build_scene(5, index, 20)
        path = np.array([scene.ego_pose(time) for time in np.arange(0, 9.5, 0.25)])
        speed = np.hypot(*np.diff(path[:, :2], axis=0).T) / 0.25
        heading = np.arctan2(*np.diff(path[:, :2], axis=0).T[::-1])
        moving = speed > 0.5
        lean = (heading - path[1:, 2] + np.pi) % (2 * np.pi) - np.pi
        assert np.abs(lean[moving]).max() < 0.02  # it drives where it points
        swings.append(np.ptp(speed))
        turns.append(np.ptp(np.unwrap(path[:, 2])))
    assert max(swings) > 1.5 and max(turns) > 0.1


def overlaps(a, b):
    """Whether two rectangles (x, y, yaw, length, width) overlap, by separating axes."""
    boxes = []
    for x, y, yaw, length, width in (a, b):
        axes = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
        boxes.append((np.array([x, y]) + signs * [length / 2, width / 2] @ axes, axes))
    for axis in np.concatenate([boxes[0][1], boxes[1][1]]):
        p, q = boxes[0][0] @ axis, boxes[1][0] @ axis
        if p.max() < q.min() or q.max() < p.min():
            return False
    return True


@pytest.mark.parametrize("index", range(4))
def test_nothing_drives_through_anything(index):
    scene = build_scene(7, index, 12)
    labelled = np.flatnonzero(scene.label != NO_LABEL)
    solid = np.flatnonzero((scene.label == NO_LABEL) & (scene.radius < 3.0))
    size = scene.size[labelled][:, [1, 0]]
    for time in np.arange(0, 5.6, 0.5):
        x, y, yaw = scene.ego_pose(time)
        poses = scene.poses(np.array([time]), labelled)[0]
        boxes = np.column_stack([poses, size])
        boxes = np.vstack([boxes, [x + 1.35 * np.cos(yaw), y + 1.35 * np.sin(yaw), yaw, 4.2, 1.8]])
        near = np.hypot(boxes[:, 0] - x, boxes[:, 1] - y) < 85
        boxes = boxes[near]
        reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
        gap = np.hypot(boxes[:, None, 0] - boxes[None, :, 0], boxes[:, None, 1] - boxes[None, :, 1])
        for i, j in np.argwhere(np.triu(gap < reach[:, None] + reach, 1)):
            assert not overlaps(boxes[i], boxes[j]), (time, boxes[i], boxes[j])
        furniture = scene.poses(np.array([time]), solid)[0]
        gap = np.hypot(boxes[:, None, 0] - furniture[None, :, 0], boxes[:, None, 1] - furniture[None, :, 1])
        for i, j in np.argwhere(gap < reach[:, None] + 3):
            for part in scene.parts[scene.part_actor == solid[j]]:
                if part[4] < 2.0:
                    where = furniture[j, :2] + [
                        np.cos(furniture[j, 2]) * part[0] - np.sin(furniture[j, 2]) * part[1],
                        np.sin(furniture[j, 2]) * part[0] + np.cos(furniture[j, 2]) * part[1],
                    ]
                    box = (*where, furniture[j, 2], 2 * part[2], 2 * part[3])
                    assert not overlaps(boxes[i], box), (time, boxes[i], box)


def test_shapes_fill_their_boxes_but_for_the_inset():
    scene = build_scene(2, 0, 4)
    for actor in np.flatnonzero(scene.label != NO_LABEL):
        parts = scene.parts[scene.part_actor == actor]
        width, length, height = scene.size[actor]
        low = np.array([(parts[:, 0] - parts[:, 2]).min(), (parts[:, 1] - parts[:, 3]).min(), parts[:, 4].min()])
        high = np.array([(parts[:, 0] + parts[:, 2]).max(), (parts[:, 1] + parts[:, 3]).max(), parts[:, 5].max()])
        assert (low >= [-length / 2 + 0.0599, -width / 2 + 0.0599, 0.03 + 0.0599]).all()
        assert (high <= [length / 2 - 0.0599, width / 2 - 0.0599, 0.03 + height - 0.0599]).all()
        assert high[2] == pytest.approx(0.03 + height - 0.06)
        assert (high - low)[1] > 0.8 * (width - 0.12), CLASSES[scene.label[actor]]


def test_conditions_round_trip_and_occur():
    drawn = [draw_conditions(3, index) for index in range(300)]
    for conditions in drawn:
        assert parse_conditions(conditions.describe()) == conditions
    assert 120 < sum(conditions == Conditions() for conditions in drawn) < 170
    shares = {"light": 0.25, "weather": 0.2, "camera_glare": 0.08, "camera_dirt": 0.08, "lidar_blind": 0.08}
    for field, share in shares.items():
        spoiled = [getattr(conditions, field) != getattr(Conditions(), field) for conditions in drawn]
        assert np.mean(spoiled) == pytest.approx(share, abs=0.015)
        assert sum(spoiled[:24]) >= 1
    with pytest.raises(ValueError, match="not a synthetic scene description"):
        parse_conditions("Night, rain, many cars")


def test_a_scene_depends_on_seed_and_index_alone():
    a, b, c = build_scene(1, 0, 4), build_scene(1, 0, 4), build_scene(2, 0, 4)
    assert np.array_equal(a.corners, b.corners) and a.ego_pose(1.0) == b.ego_pose(1.0)
    assert a.ego_pose(1.0) != c.ego_pose(1.0)
    night = build_scene(1, 0, 4, Conditions(light="night"))
    assert np.array_equal(a.s, night.s) and night.conditions.light == "night"
    assert SETTINGS["samples_per_scene"] == 4
