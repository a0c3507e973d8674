"""What nuscenes-devkit makes of a synthetic world."""

import json
from collections import Counter

import numpy as np
import pytest

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.synthetic import parse_conditions
from cmt_aqr.synthetic.scenes import build_scene
from tests.unit.synthetic.conftest import SETTINGS, SIZE

nuscenes = pytest.importorskip("nuscenes")

FOREIGN_KEYS = {
    "instance": {
        "category_token": "category",
        "first_annotation_token": "sample_annotation",
        "last_annotation_token": "sample_annotation",
    },
    "calibrated_sensor": {"sensor_token": "sensor"},
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "prev": "sample_data",
        "calibrated_sensor_token": "calibrated_sensor",
        "next": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "visibility_token": "visibility",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
}


def test_foreign_keys_resolve_and_tokens_are_unique(nusc):
    for table in nusc.table_names:
        tokens = [row["token"] for row in getattr(nusc, table)]
        assert len(tokens) == len(set(tokens)) > 0, table
    for table, keys in FOREIGN_KEYS.items():
        for row in getattr(nusc, table):
            for key, target in keys.items():
                if not (key in ("prev", "next") and row[key] == ""):
                    nusc.get(target, row[key])
    attributes = {row["token"] for row in nusc.attribute}
    assert all(set(row["attribute_tokens"]) <= attributes for row in nusc.sample_annotation)


@pytest.mark.parametrize("table", ["sample", "sample_data", "sample_annotation"])
def test_chains_are_symmetric(nusc, table):
    rows = getattr(nusc, table)
    for row in rows:
        if row["next"]:
            assert nusc.get(table, row["next"])["prev"] == row["token"]
    heads = sum(row["prev"] == "" for row in rows)
    scenes = SETTINGS["scenes"] + SETTINGS["val_scenes"]
    expected = {"sample": scenes, "sample_data": 7 * scenes, "sample_annotation": len(nusc.instance)}[table]
    assert heads == sum(row["next"] == "" for row in rows) == expected


def test_samples_have_all_sensors_at_the_right_times(nusc, world_root):
    import cv2

    for sample in nusc.sample:
        assert set(sample["data"]) == {"LIDAR_TOP", *CAMERAS}
        for channel in CAMERAS:
            data = nusc.get("sample_data", sample["data"][channel])
            assert -44_000 <= data["timestamp"] - sample["timestamp"] < 0
            assert (data["width"], data["height"]) == SIZE
            assert cv2.imread(str(world_root / data["filename"])).shape == (SIZE[1], SIZE[0], 3)
        lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        assert lidar["timestamp"] == sample["timestamp"]
    delays = {
        channel: np.mean(
            [nusc.get("sample_data", s["data"][channel])["timestamp"] - s["timestamp"] for s in nusc.sample]
        )
        for channel in CAMERAS
    }
    assert sorted(delays, key=delays.get) == [
        "CAM_FRONT_LEFT",
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_RIGHT",
        "CAM_BACK",
        "CAM_BACK_LEFT",
    ]


def test_sweeps_run_at_20_hz_between_key_frames(nusc):
    for scene in nusc.scene:
        row = nusc.get("sample_data", nusc.get("sample", scene["first_sample_token"])["data"]["LIDAR_TOP"])
        keys, stamps = [], []
        while row:
            keys.append(row["is_key_frame"])
            stamps.append(row["timestamp"])
            assert row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
            row = nusc.get("sample_data", row["next"]) if row["next"] else None
        assert keys == ([True] + [False] * 9) * 3 + [True]
        assert np.all(np.abs(np.diff(stamps) - 50_000) <= 1_600)


def test_splits_resolve(nusc):
    from nuscenes.utils.splits import get_scenes_of_split

    train, val = (get_scenes_of_split(f"synthetic_{name}", nusc) for name in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert sorted(train + val) == sorted(scene["name"] for scene in nusc.scene)


def test_every_class_is_in_every_scene_and_the_street_is_full(nusc):
    from nuscenes.eval.detection.utils import category_to_detection_name

    counts, seen = Counter(), {scene["token"]: set() for scene in nusc.scene}
    for row in nusc.sample_annotation:
        if row["num_lidar_pts"] > 0:
            name = category_to_detection_name(row["category_name"])
            counts[name] += 1
            seen[nusc.get("sample", row["sample_token"])["scene_token"]].add(name)
    assert set(counts) == set(CLASSES)
    assert all(len(names) >= 9 for names in seen.values())
    assert sum(counts.values()) / len(nusc.sample) > 30


def test_attributes_fit_the_class_and_the_motion(nusc):
    from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes

    used = set()
    for row in nusc.sample_annotation:
        names = [nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]]
        allowed = detection_name_to_rel_attributes(category_to_detection_name(row["category_name"]))
        assert len(names) == (1 if allowed else 0)
        assert set(names) <= set(allowed)
        speed = np.linalg.norm(nusc.box_velocity(row["token"])[:2])
        if names:
            used.add(names[0])
            limit = {
                "vehicle.parked": 1e-6,
                "cycle.without_rider": 1e-6,
                "pedestrian.standing": 0.6,
                "vehicle.stopped": 1.2,
            }.get(names[0])
            assert limit is None or not speed > limit, (names, speed)
            assert names[0] not in ("vehicle.moving", "pedestrian.moving") or not speed < 0.1
    assert used >= {
        "vehicle.moving",
        "vehicle.parked",
        "pedestrian.moving",
        "pedestrian.standing",
        "cycle.with_rider",
        "cycle.without_rider",
    }


def test_descriptions_say_the_conditions(nusc):
    for index, scene in enumerate(nusc.scene):
        number = index if index < SETTINGS["scenes"] else 100_000
        expected = build_scene(SETTINGS["seed"], number, SETTINGS["samples_per_scene"]).conditions
        assert parse_conditions(scene["description"]) == expected


def ground_truth(nusc, shift=0.0):
    """A submission of the ground truth of the validation split, moved by shift metres along x."""
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.utils.splits import get_scenes_of_split

    names = get_scenes_of_split("synthetic_val", nusc)
    results = {}
    for sample in nusc.sample:
        if nusc.get("scene", sample["scene_token"])["name"] in names:
            rows = [nusc.get("sample_annotation", token) for token in sample["anns"]]
            results[sample["token"]] = [
                {
                    "sample_token": sample["token"],
                    "size": row["size"],
                    "rotation": row["rotation"],
                    "translation": [row["translation"][0] + shift, *row["translation"][1:]],
                    "velocity": nusc.box_velocity(row["token"])[:2].tolist(),
                    "detection_score": 1.0,
                    "detection_name": category_to_detection_name(row["category_name"]),
                    "attribute_name": "".join(
                        nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]
                    ),
                }
                for row in rows
                if row["num_lidar_pts"] > 0
            ]
    used = {f"use_{name}": False for name in ("camera", "lidar", "radar", "map", "external")}
    return {"meta": used, "results": results}


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_ground_truth_as_prediction_scores_full_marks(nusc, tmp_path, shift):
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    (tmp_path / "results.json").write_text(json.dumps(ground_truth(nusc, shift)))
    metrics, _ = DetectionEval(
        nusc,
        config_factory("detection_cvpr_2019"),
        str(tmp_path / "results.json"),
        "synthetic_val",
        str(tmp_path / "out"),
        verbose=False,
    ).evaluate()
    present = [name for name in CLASSES if metrics.mean_dist_aps[name] > 0]
    assert len(present) >= 9
    for name in present:
        assert metrics.mean_dist_aps[name] == pytest.approx(1.0, abs=1e-6 if shift == 0 else 0.5)
        errors = {key: value for key, value in metrics._label_tp_errors[name].items() if not np.isnan(value)}
        assert errors.pop("trans_err") == pytest.approx(shift, abs=1e-6 if shift == 0 else 0.02)
        assert max(errors.values()) == pytest.approx(0.0, abs=1e-6)
