"""Detections -> submission: hand-computed poses, filters, attributes, files."""

import json
import math

import numpy as np
import pytest
import torch
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
from nuscenes.utils.data_classes import Box
from pyquaternion import Quaternion

from cmt_aqr.boxes import Detections
from cmt_aqr.classes import CLASSES
from cmt_aqr.evaluation.submission import (
    CLASS_RANGE,
    MAX_BOXES_PER_SAMPLE,
    EvaluationError,
    attribute_name,
    detections_to_submission,
    read_submission,
    submission_to_detections,
    write_submission,
)
from tests.unit.evaluation import frame

EYE = np.eye(4)[None]
FAR = dict.fromkeys(CLASSES, 200.0)


def pose(yaw: float, translation: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    matrix[:3, 3] = translation
    return matrix[None]


def detections(*rows: tuple, labels: list[int] | None = None) -> Detections:
    boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 9)
    count = len(boxes)
    scores = torch.linspace(0.9, 0.1, count, dtype=torch.float64)
    return Detections(boxes, scores, torch.tensor(labels or [0] * count, dtype=torch.int64))


def test_limits_are_those_of_the_official_configuration():
    config = config_factory("detection_cvpr_2019")
    assert config.class_range == CLASS_RANGE
    assert config.max_boxes_per_sample == MAX_BOXES_PER_SAMPLE


def test_quarter_turns_and_shifts_by_hand():
    # LiDAR: 1 m ahead of the ego origin, 2 m up, y forward, so that LiDAR = ego turned by -90 degrees. The ego faces +y
    # of the world from (100, 200). A car 10 m ahead and 3 m right, heading ahead at 5 m/s.
    rows = detections_to_submission(
        ["s"],
        [detections((3, 10, -1, 4, 2, 1.5, math.pi / 2, 0, 5))],
        pose(-math.pi / 2, (1, 0, 2)),
        pose(math.pi / 2, (100, 200, 0)),
    )["s"]
    (row,) = rows
    # ego: x = 10 + 1 ahead, y = -3; world: x = 100 + 3, y = 200 + 11.
    assert row["translation"] == pytest.approx([103, 211, 1])
    assert row["size"] == [2, 4, 1.5]
    assert row["velocity"] == pytest.approx([0, 5])
    assert Quaternion(row["rotation"]).yaw_pitch_roll[0] == pytest.approx(math.pi / 2)
    assert row["detection_name"] == "car"
    assert row["attribute_name"] == "vehicle.moving"
    assert row["detection_score"] == 0.9


def test_leaning_lidar_agrees_with_the_devkit_box():
    lean = Quaternion(axis=[1, 2, 0.5], degrees=7)
    lidar2ego, ego2global = np.eye(4), pose(2.1, (411, 1180, 0))[0]
    lidar2ego[:3, :3], lidar2ego[:3, 3] = lean.rotation_matrix, (0.9, 0, 1.8)
    values = (12.0, -7.0, -1.0, 4.4, 1.9, 1.6, -2.5, 3.0, -4.0)
    (row,) = detections_to_submission(["s"], [detections(values)], lidar2ego[None], ego2global[None])["s"]
    box = Box(values[:3], [1.9, 4.4, 1.6], Quaternion(axis=[0, 0, 1], radians=-2.5), velocity=(3.0, -4.0, 0.0))
    for matrix in (lidar2ego, ego2global):
        box.rotate(Quaternion(matrix=matrix[:3, :3]))
        box.translate(matrix[:3, 3])
    assert row["translation"] == pytest.approx(box.center.tolist(), abs=1e-9)
    assert row["velocity"] == pytest.approx(box.velocity[:2].tolist(), abs=1e-12)
    sign = math.copysign(1, np.dot(row["rotation"], box.orientation.q))
    assert row["rotation"] == pytest.approx((sign * box.orientation.q).tolist(), abs=1e-12)


def test_range_is_measured_in_the_ego_frame_per_class():
    lidar2ego = pose(0, (1, 0, 1.8))
    labels = [CLASSES.index(name) for name in ("car", "car", "barrier", "barrier", "pedestrian", "pedestrian")]
    boxes = [(x, 0, 0, 1, 1, 1, 0, 0, 0) for x in (48.9, 49.1, 28.9, 29.1, 38.9, -40.9)]
    rows = detections_to_submission(["s"], [detections(*boxes, labels=labels)], lidar2ego, pose(1, (900, 0, 0)))["s"]
    assert [(row["detection_name"], row["detection_score"]) for row in rows] == [
        ("car", pytest.approx(0.9)), ("barrier", pytest.approx(0.58)), ("pedestrian", pytest.approx(0.26)),
        ("pedestrian", pytest.approx(0.1)),
    ]  # fmt: skip


def test_best_500_boxes_in_range_are_kept():
    boxes = [(60.0 if i < 10 else 5.0, 0, 0, 1, 1, 1, 0, 0, 0) for i in range(600)]
    given = detections(*boxes)
    rows = detections_to_submission(["s"], [given], EYE, EYE)["s"]
    assert [row["detection_score"] for row in rows] == given.scores[10:510].tolist()


@pytest.mark.parametrize(
    ("name", "moving", "still"),
    [
        ("car", "vehicle.moving", "vehicle.parked"),
        ("truck", "vehicle.moving", "vehicle.parked"),
        ("trailer", "vehicle.moving", "vehicle.parked"),
        ("construction_vehicle", "vehicle.moving", "vehicle.parked"),
        ("bus", "vehicle.moving", "vehicle.stopped"),
        ("motorcycle", "cycle.with_rider", "cycle.without_rider"),
        ("bicycle", "cycle.with_rider", "cycle.without_rider"),
        ("pedestrian", "pedestrian.moving", "pedestrian.standing"),
        ("barrier", "", ""),
        ("traffic_cone", "", ""),
    ],
)
def test_attribute_rule(name, moving, still):
    assert attribute_name(name, 0.21) == moving
    assert attribute_name(name, 0.2) == attribute_name(name, 0.0) == still
    assert {moving, still} <= {*ATTRIBUTE_NAMES, ""}


def test_frame_without_detections_keeps_its_key(tmp_path):
    results = detections_to_submission(["s"], [detections()], EYE, EYE)
    assert results == {"s": []}
    path = write_submission(tmp_path / "deep" / "r.json", results, use_camera=True, use_lidar=False)
    assert read_submission(path)[1] == results


def test_file_is_whole_valid_json_and_nothing_is_left_beside_it(tmp_path):
    results = detections_to_submission(
        ["a", "b"],
        [detections((3, 10, -1, 4, 2, 1.5, 1, 0, 5)), detections()],
        np.repeat(EYE, 2, 0),
        np.repeat(EYE, 2, 0),
    )
    path = write_submission(tmp_path / "r.json", results, use_camera=False, use_lidar=True)
    content = json.loads(path.read_text())
    assert content["results"] == results
    assert content["meta"] == {
        "use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False,
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_submission(tmp_path / "r.json", {"s": []}, use_camera=True, use_lidar=True)
    before = path.read_text()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(EvaluationError, match=r"r\.json: the submission cannot be written: No space left on device"):
        write_submission(path, {"t": []}, use_camera=True, use_lidar=True)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_submission_to_detections_is_the_inverse():
    lidar2ego, ego2global = pose(-1.5, (1, 0, 2)), pose(0.7, (30, 20, 0))
    given = detections((3, 10, -1, 4, 2, 1.5, 1.2, 1, 5), (-8, 2, 0, 1, 1, 2, -3, 0, -1), labels=[1, 8])
    rows = detections_to_submission(["s"], [given], lidar2ego, ego2global)["s"]
    back = submission_to_detections(rows[::-1], lidar2ego[0], ego2global[0])
    torch.testing.assert_close(back.boxes, given.boxes.float())
    torch.testing.assert_close(back.scores, given.scores.float())
    assert back.labels.tolist() == [1, 8]
    assert submission_to_detections([], EYE[0], EYE[0]).boxes.shape == (0, 9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": ["a", "a"]}, "sample a has detections twice"),
        ({"tokens": ["a"]}, "1 sample tokens need as many detections"),
        ({"lidar2ego": np.zeros((2, 4, 4))}, "sample a: lidar2ego is no rigid transform"),
        ({"ego2global": np.full((2, 4, 4), np.nan)}, "sample a: ego2global is no rigid transform"),
        ({"ego2global": EYE}, r"poses of shape \(2, 4, 4\)"),
        (
            {"detections": [detections((1, 1, 1, 1, 0, 1, 0, 0, 0))] * 2},
            "sample a: a detection is not finite or has a s",
        ),
        ({"detections": [detections((math.nan, 1, 1, 1, 1, 1, 0, 0, 0))] * 2}, "sample a: a detection is not finite"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    given = {
        "tokens": ["a", "b"], "detections": [detections()] * 2, "lidar2ego": np.repeat(EYE, 2, 0),
        "ego2global": np.repeat(EYE, 2, 0),
    } | change  # fmt: skip
    with pytest.raises(EvaluationError, match=sentence) as error:
        detections_to_submission(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "no valid JSON"),
        ("[]", "needs the field 'meta'"),
        ('{"meta": {}}', "needs the field 'results'"),
        ('{"meta": {}, "results": {"s": 3}}', "results of sample s must be a list of rows"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unreadable_submission_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvaluationError, match=rf"r\.json.*{sentence}"):
        read_submission(path)


def test_row_without_a_field_is_one_sentence():
    with pytest.raises(EvaluationError, match="a result row cannot be read: KeyError\\('detection_name'\\)"):
        submission_to_detections([{"size": [1, 1, 1]}], EYE[0], EYE[0])


@pytest.mark.data
@frame.needs_frame
def test_real_frame_global_boxes():
    rows = detections_to_submission([frame.token()], [frame.perfect_detections()], *frame.poses(), class_range=FAR)
    tables = json.loads((frame.ROOT / frame.VERSION / "sample_annotation.json").read_text())
    annotations = {row["token"]: row for row in tables}
    assert len(rows[frame.token()]) == len(frame.objects()) > 60
    for row, item in zip(rows[frame.token()], frame.objects(), strict=True):
        truth = annotations[item["annotation_token"]]
        assert row["translation"] == pytest.approx(truth["translation"], abs=2e-5)
        assert row["size"] == truth["size"]
        turn = Quaternion(row["rotation"]).inverse * Quaternion(truth["rotation"])
        # The LiDAR leans 2.2 degrees and a detection is upright in its frame, so only the heading agrees.
        assert abs(turn.yaw_pitch_roll[0]) < 1e-3
        if item["velocity_global_xy_derived"]:
            assert row["velocity"] == pytest.approx(item["velocity_global_xy_derived"], abs=0.02)
