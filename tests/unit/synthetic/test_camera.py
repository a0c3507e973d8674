"""The images against the boxes, and what conditions do to them."""

import cv2
import numpy as np
import pytest

from cmt_aqr.classes import CAMERAS
from cmt_aqr.synthetic import Conditions
from cmt_aqr.synthetic.backdrop import ground_homography
from cmt_aqr.synthetic.camera import CameraRig
from cmt_aqr.synthetic.scenes import NO_LABEL, build_scene
from tests.unit.synthetic.conftest import SETTINGS, SIZE
from tests.unit.synthetic.test_lidar import scene_of


def test_boxes_project_onto_what_was_drawn(nusc):
    """Every well visible object's pixels fill its devkit-projected box, at the camera's own time and pose."""
    compared = 0
    for number in range(len(nusc.scene)):
        scene, start = scene_of(nusc, number)
        rig = CameraRig(scene, SIZE, SETTINGS["seed"])
        sample = nusc.get("sample", nusc.scene[number]["last_sample_token"])
        actors = scene.nearby((sample["timestamp"] - start) * 1e-6)
        rows = [nusc.get("sample_data", sample["data"][channel]) for channel in CAMERAS]
        times = np.array([(data["timestamp"] - start) * 1e-6 for data in rows])
        views = rig.render(times, actors, np.random.default_rng(0))
        for data, time, view in zip(rows, times, views, strict=True):
            stored = cv2.imread(f"{nusc.dataroot}/{data['filename']}").astype(float)
            assert np.abs(stored - view.image).mean() < 8
            poses = scene.poses(np.array([time]), view.actors)[0]
            for slot, actor in enumerate(view.actors):
                whole = view.drawn[slot] > 60 and view.visible[slot] > 0.95 * view.drawn[slot]
                if scene.label[actor] == NO_LABEL or not whole:
                    continue
                corners = box_pixels(nusc, data, scene.size[actor], scene.centre_height(actor), poses[slot])
                if corners is None:
                    continue
                drawn = np.argwhere(np.isin(view.marks, np.flatnonzero(view.mark_owner == slot)))[:, ::-1]
                low, high = corners.min(0).clip(0), corners.max(0).clip(None, np.array(SIZE) - 1)
                assert (drawn.min(0) > low - 1.5).all() and (drawn.max(0) < high + 1.5).all()
                if (corners > 0).all() and (corners < np.array(SIZE) - 1).all():
                    # The drawn thing is as large as the box but for the inset (6 cm a side) and empty corners.
                    assert (np.ptp(drawn, axis=0) > 0.6 * (high - low) - 2).all()
                    assert (np.abs(drawn.mean(0) - (low + high) / 2) < 0.2 * (high - low) + 1.5).all()
                    compared += 1
    assert compared > 30


def box_pixels(nusc, data, size, height, pose):
    """Pixels (8, 2) of a box's corners by the devkit's classes, or None when it reaches behind the image plane."""
    from nuscenes.utils.data_classes import Box
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    box = Box([pose[0], pose[1], height], size, Quaternion(axis=[0, 0, 1], radians=pose[2]))
    mount = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    for row in (nusc.get("ego_pose", data["ego_pose_token"]), mount):
        box.translate(-np.array(row["translation"]))
        box.rotate(Quaternion(row["rotation"]).inverse)
    corners = box.corners()
    if corners[2].min() < 0.5:
        return None
    return view_points(corners, np.array(mount["camera_intrinsic"]), normalize=True)[:2].T


def test_ground_homography_undoes_the_projection():
    intrinsic = np.array([[1266.0, 0, 816], [0, 1250, 491], [0, 0, 1]])
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    position = np.array([1013.0, 640.5, 1.6])
    ground = np.array([[1020.0, 655, 0], [1001, 630, 0], [1013.5, 640, 0]])
    pixels = (ground - position) @ axes @ intrinsic.T
    back = pixels / pixels[:, 2:] @ ground_homography(axes, position, intrinsic).T
    assert np.allclose(back[:, :2] / back[:, 2:], ground[:, :2], rtol=0, atol=1e-6)


def test_visibility_is_lower_for_what_is_hidden(nusc):
    """An object without LiDAR points is mostly hidden; one with many points is mostly visible."""
    hidden = [row["visibility_token"] for row in nusc.sample_annotation if row["num_lidar_pts"] == 0]
    clear = [row["visibility_token"] for row in nusc.sample_annotation if row["num_lidar_pts"] > 100]
    assert np.mean(np.array(hidden, dtype=int)) < 2.0
    assert np.mean(np.array(clear, dtype=int)) > 3.0
    assert {row["visibility_token"] for row in nusc.sample_annotation} == {"1", "2", "3", "4"}


@pytest.fixture(scope="module")
def images():
    def render(**conditions):
        scene = build_scene(3, 0, 4, Conditions(**conditions))
        rig = CameraRig(scene, SIZE, 3)
        views = rig.render(np.full(6, 0.5), scene.nearby(0.5), np.random.default_rng(0))
        return [view.image.astype(float) for view in views]

    return render


def test_light(images):
    level = {light: np.mean(images(light=light)) for light in ("day", "dusk", "night")}
    assert level["night"] < 0.4 * level["day"]
    assert level["night"] < level["dusk"] < 0.9 * level["day"]


def test_fog_takes_the_contrast(images):
    # Edges in the strip around the horizon, where things are far.
    clear, fog = (np.abs(np.diff(np.array(images(**words))[:, 85:105], axis=2)) for words in ({}, {"weather": "fog"}))
    assert (fog > 25).mean() < 0.7 * (clear > 25).mean()


def test_glare_and_dirt_spoil_one_camera_only(images):
    clean, spoiled = images(), images(camera_glare="CAM_BACK", camera_dirt="CAM_FRONT_LEFT")
    for channel, a, b in zip(CAMERAS, clean, spoiled, strict=True):
        change = (b - a).mean()
        if channel == "CAM_BACK":
            assert change > 20
        elif channel == "CAM_FRONT_LEFT":
            assert np.abs(b - a).mean() > 5
        else:
            assert np.array_equal(a, b)


def test_classes_differ_in_colour(images):
    """A cone, a bus, a pedestrian and so on can be told apart by colour: mean drawn colours spread widely."""
    scene = build_scene(3, 0, 4, Conditions())
    view = next(CameraRig(scene, (800, 450), 3).render(np.full(6, 0.5), scene.nearby(0.5), np.random.default_rng(0)))
    means = {}
    for mark, slot in enumerate(view.mark_owner):
        if slot >= 0 and (view.marks == mark).sum() > 30:
            means.setdefault(int(scene.label[view.actors[slot]]), view.image[view.marks == mark].mean(0))
    assert len(means) >= 4
    colours = np.array(list(means.values()))
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1)[np.triu_indices(len(colours), 1)]
    assert np.median(gaps) > 25
