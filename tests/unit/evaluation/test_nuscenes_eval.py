"""Official metrics through our path: the real frame, a tiny world, and every way to get it wrong."""

import json
import math

import numpy as np
import pytest
import torch
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval

from cmt_aqr import nuscenes_tables
from cmt_aqr.boxes import Detections
from cmt_aqr.classes import CLASSES
from cmt_aqr.evaluation.nuscenes_eval import evaluate_submission, format_table, load_nuscenes, split_tokens
from cmt_aqr.evaluation.run import FrameResult, evaluate
from cmt_aqr.evaluation.submission import EvaluationError, detections_to_submission, write_submission
from cmt_aqr.nuscenes_tables import Tables
from tests.unit.evaluation import frame, tiny_world

CARS = [("vehicle.car", (10.0, 0.0, 0.0)), ("vehicle.car", (-20.0, 5.0, 0.0)), ("vehicle.truck", (70.0, 0.0, 0.0))]
IN_RANGE = ("car", "truck", "barrier", "pedestrian", "traffic_cone")


@pytest.fixture(scope="module")
def real():
    return load_nuscenes(frame.ROOT, frame.VERSION)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny_world.write(
        tmp_path_factory.mktemp("world"),
        scenes={"one": 2, "two": 1},
        boxes=CARS,
        splits={"first": ["one"], "second": ["two"], "elsewhere": ["three"]},
    )
    return load_nuscenes(root, tiny_world.VERSION)


def score(nusc, results, tmp_path, split="first", **options):
    path = write_submission(tmp_path / "results.json", results, use_camera=True, use_lidar=True)
    return evaluate_submission(nusc.dataroot, nusc.version, split, path, tmp_path / "out", nusc=nusc, **options)


def score_real(nusc, detections, tmp_path, velocity_file=frame.VELOCITIES):
    results = detections_to_submission([frame.token()], [detections], *frame.poses())
    return score(nusc, results, tmp_path, frame.SPLIT, velocity_file=velocity_file)


def perfect(tokens=("one-0", "one-1")):
    return {t: [tiny_world.row(t, where) for category, where in CARS if category == "vehicle.car"] for t in tokens}


@pytest.mark.data
@frame.needs_frame
def test_ground_truth_of_the_real_frame_scores_one(real, tmp_path):
    metrics = score_real(real, frame.perfect_detections(), tmp_path)
    assert {name for name in CLASSES if metrics.num_ground_truth[name]} == set(IN_RANGE)
    assert metrics.num_ground_truth["pedestrian"] == 10
    assert metrics.mean_ap_in_range == pytest.approx(1, abs=1e-9)
    assert metrics.mean_ap == pytest.approx(0.5, abs=1e-9)
    for name in IN_RANGE:
        assert list(metrics.ap_at[name].values()) == pytest.approx([1.0] * 4, abs=1e-9)
        assert metrics.errors[name]["ATE"] < 1e-6
        assert metrics.errors[name]["ASE"] < 1e-6
        # Upright in a frame that leans 2.2 degrees: the heading and the velocity of the real boxes differ by this.
        if name != "traffic_cone":
            assert metrics.errors[name]["AOE"] < 1e-3
        if name not in ("traffic_cone", "barrier"):
            assert metrics.errors[name]["AVE"] < 0.013
    assert math.isnan(metrics.errors["traffic_cone"]["AOE"])
    assert real.box_velocity.__func__ is type(real).box_velocity, "the velocity file must not outlive the call"


@pytest.mark.data
@frame.needs_frame
def test_without_velocities_their_error_is_one(real, tmp_path):
    metrics = score_real(real, frame.perfect_detections(), tmp_path, velocity_file=None)
    assert metrics.errors["car"]["AVE"] == 1
    assert metrics.mean_ap_in_range == pytest.approx(1, abs=1e-9)


@pytest.mark.data
@frame.needs_frame
def test_shift_and_turn_cost_what_they_should(real, tmp_path):
    truth = frame.perfect_detections()
    boxes = truth.boxes.clone()
    # 0.75 m along x of the world, 0.3 rad counter-clockwise.
    lidar2ego, ego2global = frame.poses()
    to_lidar = np.linalg.inv(ego2global[0, :3, :3] @ lidar2ego[0, :3, :3])
    boxes[:, :3] += torch.from_numpy(to_lidar @ [0.75, 0, 0])
    boxes[:, 6] += 0.3
    metrics = score_real(real, Detections(boxes, truth.scores, truth.labels), tmp_path)
    at = {d: np.mean([metrics.ap_at[name][d] for name in IN_RANGE]) for d in (0.5, 1.0, 2.0, 4.0)}
    assert metrics.mean_ap_in_range == pytest.approx(0.735, abs=0.005)
    assert at[0.5] < 0.1
    assert at[2.0] > 0.9
    assert metrics.errors["car"]["ATE"] == pytest.approx(0.75, abs=1e-5)
    assert metrics.errors["car"]["AOE"] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.data
@frame.needs_frame
def test_figures_are_those_of_the_devkit_alone(real, tmp_path):
    truth = frame.perfect_detections()
    noise = torch.randn(truth.boxes.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    noise[:, 3:6] = 0
    metrics = score_real(real, Detections(truth.boxes + noise, truth.scores, truth.labels), tmp_path, None)
    config = config_factory("detection_cvpr_2019")
    path = str(tmp_path / "results.json")
    official, _ = DetectionEval(real, config, path, "mini_train", str(tmp_path / "devkit"), verbose=False).evaluate()
    assert 0 < metrics.mean_ap_in_range < 1
    assert (metrics.mean_ap, metrics.nds) == (official.mean_ap, official.nd_score)
    assert metrics.mean_errors == {
        f"m{n}": v for n, v in zip(metrics.errors["car"], official.tp_errors.values(), strict=True)
    }
    assert metrics.ap == official.mean_dist_aps


def test_tiny_world_by_hand(world, tmp_path):
    results = perfect()
    # Half of the second sample's cars, and a false box that outranks everything: precision is 3/4 up to recall 3/4.
    results["one-1"] = [results["one-1"][0], tiny_world.row("one-1", (0, 30, 0), 0.9)]
    metrics = score(world, results, tmp_path)
    assert metrics.num_ground_truth["car"] == 4
    assert metrics.num_ground_truth["truck"] == 0, "70 m away"
    assert metrics.num_detections["car"] == 4
    # Precision after k of 3 hits behind the false box is k / (k + 1), linear in between and before; by the devkit's
    # rule AP is the mean of max(precision - 0.1, 0) / 0.9 over recall 0.11 ... 1.00.
    recall = np.arange(11, 101) / 100
    precision = np.interp(recall, [0, 0.25, 0.5, 0.75], [0, 1 / 2, 2 / 3, 3 / 4], right=0)
    assert metrics.ap["car"] == pytest.approx(np.clip(precision - 0.1, 0, None).mean() / 0.9, abs=1e-9)
    assert metrics.mean_ap_in_range == metrics.ap["car"]
    assert metrics.mean_ap == pytest.approx(metrics.ap["car"] / 10)
    assert metrics.errors["car"]["ATE"] == 0


def test_no_detection_at_all_scores_zero(world, tmp_path):
    metrics = score(world, {"one-0": [], "one-1": []}, tmp_path)
    assert (metrics.mean_ap, metrics.nds, metrics.mean_ap_in_range) == (0, 0, 0)
    assert metrics.mean_errors["mATE"] == 1
    assert metrics.num_ground_truth["car"] == 4


def test_detections_out_of_range_only_score_zero(world, tmp_path):
    results = {t: [tiny_world.row(t, (0, 55, 0))] for t in ("one-0", "one-1")}
    metrics = score(world, results, tmp_path)
    assert (metrics.mean_ap, metrics.num_detections["car"]) == (0, 0)


def test_metrics_file_and_table(world, tmp_path):
    metrics = score(world, perfect(), tmp_path)
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["mean_ap"] == metrics.mean_ap == pytest.approx(0.1)
    assert saved["ap_at"]["car"] == pytest.approx({"0.5": 1, "1.0": 1, "2.0": 1, "4.0": 1}, abs=1e-9)
    assert saved["errors"]["barrier"]["AVE"] is None
    table = format_table(metrics)
    lines = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert lines["car"][1:7] == ["4", "4", "1.000", "1.000", "1.000", "1.000"]
    assert lines["barrier"][-2:] == ["-", "-"]
    assert "mean AP of the 1 classes in range 1.0000" in table
    assert "nan" not in table
    assert metrics.scalars()["AP/car"] == pytest.approx(1, abs=1e-9)


def test_devkit_is_silent_unless_asked(world, tmp_path, capsys):
    score(world, perfect(), tmp_path)
    assert capsys.readouterr() == ("", "")
    score(world, perfect(), tmp_path, verbose=True)
    assert "bike rack" in capsys.readouterr().out


def test_tables_are_loaded_once_for_many_evaluations(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(nuscenes_tables, "CheckedNuScenes", lambda *place, **_: loaded.append(place) or world)
    tables = Tables(world.dataroot, world.version)
    assert not loaded  # processes that do not evaluate have nothing to load
    frames = [
        FrameResult(
            token, Detections(torch.zeros(0, 9), torch.zeros(0), torch.zeros(0).long()), *torch.eye(4).repeat(2, 1, 1)
        )
        for token in ("one-0", "one-1")
    ]
    for folder in ("epoch_1", "epoch_2"):
        metrics = evaluate(
            frames,
            folder=tmp_path / folder,
            tables=tables,
            split="first",
            velocity_file=None,
            use_camera=True,
            use_lidar=True,
        )
        assert metrics.mean_ap == 0 and sum(metrics.num_ground_truth.values()) > 0
    assert loaded == [(world.dataroot, world.version)]


def test_split_tokens(world):
    assert split_tokens(world, "first") == ["one-0", "one-1"]
    for split, problem in (("val", "has no sample in this data set"), ("none", "is unknown")):
        with pytest.raises(EvaluationError, match=f"split '{split}' {problem}; available there: first, second$"):
            split_tokens(world, split)


def edited(**changes):
    results = perfect()
    results["one-0"][0] |= changes
    return results


def without(field):
    results = perfect()
    del results["one-0"][0][field]
    return results


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ({**perfect(), "zero": []}, "results for unknown tokens: 1, the first is 'zero'"),
        ({**perfect(), "two-0": []}, "results for samples outside split 'first': 1, the first is 'two-0'"),
        ({"one-0": []}, "no results for samples of split 'first': 1, the first is 'one-1'"),
        ({}, "no results for samples of split 'first': 2"),
        (
            {**perfect(), "one-1": [tiny_world.row("one-1", (0, 0, 0))] * 501},
            "501 boxes in sample one-1, .* allows 500",
        ),
        (edited(detection_name="tram"), "row 0 of sample one-0: Unknown detection_name tram"),
        (edited(attribute_name="red"), "row 0 of sample one-0: Unknown attribute_name red"),
        (edited(size=[1, 0, 1]), "row 0 of sample one-0: numbers must be finite, sizes positive"),
        (edited(velocity=[math.nan, 0]), "row 0 of sample one-0: numbers must be finite"),
        (edited(translation=[1, 2]), "row 0 of sample one-0: Translation must have 3 elements"),
        (edited(rotation=[0, 0, 0, 0]), "row 0 of sample one-0: .*the rotation not zero"),
        (edited(size="big"), "row 0 of sample one-0"),
        (edited(detection_score=None), "row 0 of sample one-0"),
        (edited(sample_token="one-1"), "row 0 of sample one-0: its sample_token is 'one-1'"),
        (without("size"), "row 0 of sample one-0: the field 'size' is missing"),
    ],
)
def test_bad_submission_is_one_sentence(world, tmp_path, results, sentence):
    with pytest.raises(EvaluationError, match=sentence) as error:
        score(world, results, tmp_path)
    assert "results.json: " in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_broken_data_set_is_one_sentence(tmp_path):
    with pytest.raises(EvaluationError, match=r"no version 'v1.0-mini'; it has none"):
        load_nuscenes(tmp_path, "v1.0-mini")
    root = tiny_world.write(tmp_path / "w", scenes={"one": 1}, boxes=CARS, splits={})
    with pytest.raises(EvaluationError, match=r"no version 'v1.0-mini'; it has v1.0-tiny"):
        load_nuscenes(root, "v1.0-mini")
    (root / tiny_world.VERSION / "sample.json").write_text("[{")
    with pytest.raises(EvaluationError, match=r"sample\.json is not valid JSON"):
        load_nuscenes(root, tiny_world.VERSION)


@pytest.mark.parametrize("boxes", [[], [("vehicle.car", (80.0, 0.0, 0.0))], [("animal", (3.0, 0.0, 0.0))]])
def test_split_without_ground_truth_is_one_sentence(tmp_path, boxes):
    root = tiny_world.write(tmp_path / "w", scenes={"one": 1}, boxes=boxes, splits={"all": ["one"]})
    nusc = load_nuscenes(root, tiny_world.VERSION)
    with pytest.raises(EvaluationError, match="split 'all' has no ground truth to score against"):
        score(nusc, {"one-0": [tiny_world.row("one-0", (1, 1, 1))]}, tmp_path, split="all")


def test_velocity_file_replaces_what_it_lists(world, tmp_path):
    path = tmp_path / "v.json"
    listed = {f"one-{i}-{j}": {"velocity_global_xy": [3, 4]} for i in range(2) for j in range(2)}
    path.write_text(json.dumps(listed))
    assert score(world, perfect(), tmp_path, velocity_file=path).errors["car"]["AVE"] == pytest.approx(5)
    # The devkit finds none in lone frames; an unknown velocity is left out of the mean.
    del listed["one-0-0"]
    path.write_text(json.dumps(listed | {"one-1-0": {"velocity_global_xy": None}}))
    assert score(world, perfect(), tmp_path, velocity_file=path).errors["car"]["AVE"] == pytest.approx(5)
    path.write_text("{}")
    assert score(world, perfect(), tmp_path, velocity_file=path).errors["car"]["AVE"] == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"v\.json does not exist"),
        ("{", r"v\.json is not valid JSON"),
        ('{"a": 3}', r"v\.json: 'a' has 3, expected annotation token"),
        (
            '{"a": {"velocity_global_xy": [1, "x"]}}',
            r"'a' has velocity_global_xy \[1, 'x'\], expected two finite",
        ),
    ],
)
def test_bad_velocity_file_is_one_sentence(world, tmp_path, content, sentence):
    path = tmp_path / "v.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EvaluationError, match=sentence):
        score(world, perfect(), tmp_path, velocity_file=path)


def test_ground_truth_with_an_attribute_that_the_benchmark_does_not_know(tmp_path):
    root = tiny_world.write(tmp_path / "w", scenes={"one": 1}, boxes=CARS, splits={"all": ["one"]})
    table = root / tiny_world.VERSION / "attribute.json"
    table.write_text(json.dumps([{"token": "parked", "name": "vehicle.flying", "description": ""}]))
    nusc = load_nuscenes(root, tiny_world.VERSION)
    with pytest.raises(EvaluationError, match=r"attribute\.json: parked has name 'vehicle\.flying', expected one of "):
        score(nusc, {"one-0": []}, tmp_path, split="all")
