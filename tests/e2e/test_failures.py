"""Failing sensors through the command line: one run, one table; the same numbers in any batch and process."""

import json

import pytest

from cmt_aqr.tools.analyze import main as analyze
from tests.e2e.conftest import Result, World, read_lines
from tests.unit.viz.test_page import Page

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "run"
    result = world.run(
        "train.py",
        "--work-dir",
        folder,
        settings=("training.epochs=1", "data.failures=[{case: fog, probability: 0.5}]"),
    )
    assert result.status == 0, result.err
    return folder / "latest.pt"


def run_test(world: World, checkpoint, out, *arguments: str, settings=(), processes: int = 1) -> Result:
    return world.run(
        "test.py", "--checkpoint", checkpoint, "--out", out, *arguments, settings=settings, processes=processes
    )


def report_of(folder) -> dict:
    return json.loads((folder / "failures.json").read_text())


def test_one_run_tests_all_failures(world, checkpoint, tmp_path):
    names = ("--failure", "beams:4", "--failure", "view_drop:FRONT,BACK", "--failures", "mome")
    result = run_test(world, checkpoint, tmp_path / "a", *names)
    assert result.status == 0, result.err
    report = report_of(tmp_path / "a")
    assert [row["name"] for row in report["failures"]] == [
        "beams:4", "view_drop:FRONT,BACK", "elevation_beams:4", "lidar_drop", "fov:60", "object_failure",
        "view_drop:all", "occlusion",
    ]  # fmt: skip
    for name in ("beams:4 ", "view_drop:FRONT,BACK ", "clean "):
        assert any(line.startswith(name) for line in result.out.splitlines())
    assert "evaluate" not in result.out and "failures.json, failures.png and a folder for each failure" in result.out
    for folder in ("clean", "beams_4", "view_drop_FRONT-BACK", "occlusion"):
        assert (tmp_path / "a" / folder / "metrics.json").is_file()
        assert len(list((tmp_path / "a" / folder).glob("*.jpg"))) == 1
    page = Page((tmp_path / "a" / "report.html").read_text())
    assert len(page.options) == 9 and len(page.images) == 10  # clean, eight failures, the bars
    assert len(read_lines(tmp_path / "a" / "log.jsonl", "test")) == 9
    # The clean row is what an ordinary test gives.
    assert run_test(world, checkpoint, tmp_path / "plain").status == 0
    plain = json.loads((tmp_path / "plain" / "metrics.json").read_text())
    assert report["clean"]["NDS"] == pytest.approx(plain["nds"], abs=1e-6)
    submissions = {path.read_bytes() for path in (tmp_path / "a").glob("*/submission.json")}
    assert len(submissions) > 6  # the failures reach the network

    # Two processes, two workers each, another batch size: the same detections.
    settings = ("evaluation.batch_size=3", "data.workers=2", "evaluation.num_pictures=0")
    again = run_test(world, checkpoint, tmp_path / "b", *names, settings=settings, processes=2)
    assert again.status == 0, again.err
    for row, other in zip(report["failures"], report_of(tmp_path / "b")["failures"], strict=True):
        assert row["name"] == other["name"]
        assert row["NDS"] == pytest.approx(other["NDS"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (("--failure", "beam:4"), (), "error: --failure 'beam:4': no failure is called 'beam', expected one of beams"),
        (("--failures", "mom"), (), "error: --failures 'mom': unknown suite, expected one of multicorrupt"),
        ((), ("data.drop_cameras=1",), "error: --set data.drop_cameras=1: acts in training only, test.py would test"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_one_sentence(
    world, checkpoint, tmp_path, call, arguments, settings, sentence
):
    result = call(
        "test", *world.arguments("--checkpoint", checkpoint, "--out", tmp_path, *arguments, settings=settings)
    )
    assert result.status == 2 and result.err.startswith(sentence) and result.err.count("\n") == 1


def test_a_wrong_failure_in_training_is_refused_before_anything_is_written(world, tmp_path, call):
    settings = ("data.failures=[{case: beams:5, probability: 0.5}]",)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert result.status == 2 and not (tmp_path / "run").exists()
    assert result.err.startswith("error: --set data.failures=")
    assert "data.failures[0].case 'beams:5': beams takes one of the levels 16, 8, 4, got '5'" in result.err


def test_analyze_looks_at_clean_and_failing_frames(world, checkpoint, tmp_path, capsys):
    arguments = world.arguments(
        "--checkpoint", checkpoint, "--out", tmp_path, "--failure", "lidar_drop", "--score", "0"
    )
    assert analyze(arguments) == 0
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert list(report["variants"]) == ["clean", "lidar_drop"] and report["frames"] == 3
    clean, dropped = report["variants"].values()
    assert clean["objects"] == 3 * 80 and len(clean["attention_by_layer"]) == 2
    assert clean["weights"]["lidar"]["all"]["mean"] != dropped["weights"]["lidar"]["all"]["mean"]
    for layer in clean["attention_by_layer"]:
        assert sum(layer["mass"]) == pytest.approx(1, abs=1e-4) and 0 < layer["change"][0] < 2
    assert (tmp_path / "weights.png").is_file() and (tmp_path / "attention.png").is_file()
    plain = world.arguments("--checkpoint", checkpoint, settings=("model.aqr=null", "training.decay_mult={}"))
    assert analyze(plain) == 2
    assert "model.aqr: is null: a model without AQR has no weights to analyze" in capsys.readouterr().err
