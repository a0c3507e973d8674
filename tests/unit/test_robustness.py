"""The table of failures: resistance, its means, what is refused before anything runs."""

import json
import math
from pathlib import Path

import pytest

from cmt_aqr.classes import CLASSES
from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.data.failures import parse_failures
from cmt_aqr.data.sample import DataError
from cmt_aqr.evaluation.nuscenes_eval import Metrics
from cmt_aqr.failure_report import (
    FailureTest,
    Row,
    case_resistances,
    format_failures,
    mean_resistance,
    resistance,
    write_report,
)
from cmt_aqr.robustness import check_training_keys, choose_failures

CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_tiny.yaml"


def metrics(nds: float, mean_ap: float = 0.5) -> Metrics:
    zeros = dict.fromkeys(CLASSES, 0.0)
    errors = dict.fromkeys(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), math.nan)
    counts = dict.fromkeys(CLASSES, 1)
    return Metrics("val", 7, mean_ap, nds, mean_ap, errors, zeros, {}, {}, counts, counts)


def rows_of(scores: dict[str, float], clean: float = 0.8) -> list[Row]:
    return [Row(None, metrics(clean)), *(Row(parse_failures([name])[0], metrics(s)) for name, s in scores.items())]


def test_resistance_by_hand():
    rows = rows_of({"beams:16": 0.72, "beams:8": 0.64, "beams:4": 0.40, "occlusion": 0.6, "fog:1": 0.2})
    assert resistance(rows[1], rows[0]) == pytest.approx(0.9)
    means = case_resistances(rows)
    assert means == pytest.approx({"beams": (0.9 + 0.8 + 0.5) / 3, "occlusion": 0.75})  # fog lacks two severities
    assert mean_resistance(rows) is None
    assert math.isnan(resistance(rows[1], Row(None, metrics(0.0))))


def test_mean_resistance_is_over_nine_corruptions_without_snow():
    failures = parse_failures([], "multicorrupt")
    scores = {failure.name: 0.01 if failure.case == "snow" else 0.4 for failure in failures}
    scores["beams:4"] = 0.4 - 0.27
    assert mean_resistance(rows_of(scores)) == pytest.approx(0.5 - 0.27 / 0.8 / 27)
    del scores["temporal:2"]
    assert mean_resistance(rows_of(scores)) is None


def test_the_table(tmp_path):
    test = FailureTest("val", (), 3)
    rows = rows_of({"beams:16": 0.72, "beams:8": 0.64, "beams:4": 0.40, "view_drop:FRONT,BACK": 0.6})
    lines = format_failures(rows, test).splitlines()
    assert lines[0] == "split val, 7 samples, 4 failures, seed 3"
    assert [line.split() for line in lines[3:]] == [
        ["clean", "0.8000", "0.5000"],
        ["beams:16", "0.7200", "0.5000", "0.900", "0.0800", "0.0000"],
        ["beams:8", "0.6400", "0.5000", "0.800", "0.1600", "0.0000"],
        ["beams:4", "0.4000", "0.5000", "0.500", "0.4000", "0.0000"],
        ["mean", "of", "beams", "0.733"],
        ["view_drop:FRONT,BACK", "0.6000", "0.5000", "0.750", "0.2000", "0.0000"],
    ]
    complete = format_failures(rows_of({f.name: 0.4 for f in parse_failures([], "multicorrupt")}), test)
    assert complete.endswith("but snow: 0.500 (CMT on nuScenes val, the same nine: 0.880)")
    write_report(rows, test, load_config(CONFIG), tmp_path)
    report = json.loads((tmp_path / "failures.json").read_text())
    assert report["clean"]["NDS"] == 0.8 and report["clean"]["mATE"] is None
    assert [row["name"] for row in report["failures"]] == [row.name for row in rows[1:]]
    assert report["failures"][3]["views"] == ["CAM_FRONT", "CAM_BACK"]
    assert report["failures"][2]["RA"] == pytest.approx(0.5)
    assert report["failures"][2]["drop_NDS"] == pytest.approx(0.4)
    assert report["RA_of_cases"] == {"beams": pytest.approx(0.7333, abs=1e-4)} and report["mRA"] is None
    assert (tmp_path / "failures.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("data.drop_cameras=1", "use --failure camera_drop"),
        ("data.drop_lidar=0.5", "use --failure lidar_drop"),
        ("data.failures=[]", r"use --failure NAME\[:LEVEL\]"),
    ],
)
def test_keys_of_training_are_refused_in_a_test(entry, advice):
    with pytest.raises(ConfigError, match=rf"acts in training only, test.py would test clean frames; {advice}$"):
        check_training_keys(["data.num_sweeps=1", entry])
    check_training_keys(["data.num_sweeps=1", "training.lr=1"])


def test_failures_of_a_model_with_one_sensor():
    sentence = r"^--failure 'beams:16': it affects no sensor of this model, which has camera only$"
    with pytest.raises(DataError, match=sentence):
        choose_failures(["beams"], None, ["camera"])
    chosen = choose_failures([], "mome", ["camera"])
    assert [failure.name for failure in chosen] == ["view_drop:all", "occlusion"]
    both = choose_failures(["occlusion"], "mome", ["lidar", "camera"])
    assert len(both) == 6 and both[0].name == "occlusion"
