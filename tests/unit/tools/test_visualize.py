"""The drawing program on the real frame, and its sentences."""

import json
from pathlib import Path

import cv2
import pytest

from cmt_aqr.evaluation.submission import detections_to_submission, write_submission
from cmt_aqr.tools.visualize import main
from tests.unit.evaluation import frame
from tests.unit.viz.test_page import Page

pytestmark = [pytest.mark.data, frame.needs_frame]


def run(out, *arguments):
    data = ["--dataroot", str(frame.ROOT), "--version", frame.VERSION, "--split", frame.SPLIT]
    return main([*data, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    results = detections_to_submission([frame.token()], [frame.perfect_detections()], *frame.poses())
    return str(write_submission(tmp_path_factory.mktemp("s") / "r.json", results, use_camera=True, use_lidar=True))


@pytest.mark.parametrize("sensors", ["both", "camera", "lidar"])
def test_frame_with_ground_truth_and_detections(tmp_path, capsys, submission, sensors):
    assert run(tmp_path, "--submission", submission, "--sensors", sensors, "--format", "png") == 0
    path = tmp_path / f"00000_{frame.token()[:16]}.png"
    assert capsys.readouterr().out.split() == [str(path), str(tmp_path / "report.html")]
    page = Page((tmp_path / "report.html").read_text())
    assert [[image.shape for image in section] for section in page.sections] == [[cv2.imread(str(path)).shape]]
    assert page.options == [f"scene-0061, sample {frame.token()}"]
    assert cv2.imread(str(path)).shape[1] == (1362 if sensors == "lidar" else 2706)


def test_hits_of_a_submission(tmp_path, capsys, submission):
    arguments = ["--submission", submission, "--colour", "outcome", "--max-boxes", "20", "--score"]
    (rows,) = json.loads(Path(submission).read_text())["results"].values()  # those in nuScenes' range of their class
    for score in (0.0, 0.96):
        assert run(tmp_path, *arguments, str(score)) == 0
        capsys.readouterr()
        page = Page((tmp_path / "report.html").read_text())
        hits = sum(row["detection_score"] >= score for row in rows)
        missed = 68 - hits
        assert 5 < hits < 40
        assert page.cells[6:-2] == ["submission, clean", str(hits), "0", str(missed)]
        assert page.cells[-2:] == ["1.000", f"{hits / (hits + missed):.3f}"]
    for arguments in ([], ["--submission", submission, "--no-ground-truth"]):
        assert run(tmp_path, *arguments, "--colour", "outcome") == 2
        assert "--colour outcome: needs --submission, and ground truth to compare it with" in capsys.readouterr().err


def test_sentences(tmp_path, capsys, submission):
    other = write_submission(tmp_path / "other.json", {"other": []}, use_camera=True, use_lidar=True)
    broken = write_submission(tmp_path / "broken.json", {frame.token(): [{}]}, use_camera=True, use_lidar=True)
    for arguments, sentence in (
        (["--tokens", "nothing"], "has no sample 'nothing'"),
        (["--submission", str(other)], f"other.json: no results for sample {frame.token()}"),
        (["--submission", str(broken)], f"broken.json: sample {frame.token()}: a result row cannot be read"),
        (["--submission", str(tmp_path / "none.json")], "none.json: the submission cannot be read"),
        (["--version", "v1.0-none"], "has no version 'v1.0-none'"),
    ):
        assert run(tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1
