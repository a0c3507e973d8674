"""report.html of a run, made of the files that a training or a test leaves."""

import json

import cv2
import numpy as np
import pytest

from cmt_aqr.classes import CLASSES
from cmt_aqr.errors import UserError
from cmt_aqr.run_page import keep_page, write_run_page
from cmt_aqr.training.logs import LogError, RunLog
from cmt_aqr.training.run_folder import remove_pictures, remove_run
from tests.unit.viz.test_page import Page

ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")


def picture(path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((30, 50, 3), level, np.uint8))


def scores(nds: float) -> dict:
    return {"NDS": nds, "mAP": nds / 2, "mATE": 0.5, "mASE": 0.25, "mAOE": None, "mAVE": 1.5, "mAAE": 0.125}


def metrics(path, ap: float) -> None:
    report = {
        "ap": dict.fromkeys(CLASSES, ap),
        "errors": {name: dict.fromkeys(ERRORS, 0.75) | {"AOE": None} for name in CLASSES},
        "num_ground_truth": dict.fromkeys(CLASSES, 7),
        "num_detections": dict.fromkeys(CLASSES, 9),
    }
    path.write_text(json.dumps(report))


def training(folder) -> None:
    with RunLog(folder, is_main=True, tensorboard=False) as log:
        for epoch in (2, 4):
            log.record("train", 10 * epoch, epoch=float(epoch), loss=3.0 / epoch, lr=0.1, grad_norm=1.0)
            log.record("eval", 10 * epoch, epoch=epoch, **scores(0.1 * epoch))
            evaluated = folder / "eval" / f"epoch_{epoch}"
            for i in range(epoch):
                picture(evaluated / "pictures" / f"{i:02d}_{'ab' * 8}.jpg", 50 * i)
            picture(evaluated / "pictures" / "of the user.jpg", 255)
            metrics(evaluated / "metrics.json", 0.1 * epoch)
        log.record("eval", 50, epoch=5, error="the disk is full")


def test_a_training_shows_its_last_evaluation_and_its_curves(tmp_path):
    training(tmp_path)
    page = Page(write_run_page(tmp_path, "my run").read_text())
    assert page.options == [f"{i}: sample {'ab' * 8}" for i in range(4)]
    assert [round(section[0].mean() / 50) for section in page.sections] == [0, 1, 2, 3]
    assert len(page.images) == 5 and page.images[-1].shape[1] > 1600  # the curves
    cells = page.cells
    start = cells.index("epoch")
    assert cells[start : start + 8] == ["epoch", "NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE"]
    assert cells[start + 8 : start + 16] == ["2", "0.200", "0.100", "0.500", "0.250", "-", "1.500", "0.125"]
    assert cells[start + 16 : start + 18] == ["4", "0.400"]
    car = cells.index("car")
    assert cells[car : car + 9] == ["car", "7", "9", "0.400", "0.750", "0.750", "-", "0.750", "0.750"]
    assert "traffic cone" in cells


def test_a_test_under_failures_shows_one_frame_under_each(tmp_path):
    names = {"clean": "clean", "view_drop:FRONT,BACK": "view_drop_FRONT-BACK", "beams:4": "beams_4"}
    with RunLog(tmp_path, is_main=True, tensorboard=False) as log:
        for i, (name, folder) in enumerate(names.items()):
            log.record("test", 0, split="val", failure=name, **scores(0.5 - 0.1 * i))
            picture(tmp_path / folder / "abcd.jpg", 60 * i)
    metrics(tmp_path / "clean" / "metrics.json", 0.625)
    picture(tmp_path / "failures.png", 5)
    page = Page(write_run_page(tmp_path, "t").read_text())
    assert "scores by class, without failure (" in (tmp_path / "report.html").read_text()
    assert page.options == [f"{name}, sample abcd" for name in names]
    assert [round(section[0].mean() / 60) for section in page.sections] == [0, 1, 2]
    assert page.images[-1].shape == (30, 50, 3) and len(page.images) == 4
    row = page.cells.index("beams:4")
    assert page.cells[row : row + 3] == ["beams:4", "0.300", "0.150"] and "0.625" in page.cells


def test_a_submission_without_scores_has_a_page_of_its_pictures(tmp_path):
    with RunLog(tmp_path, is_main=True, tensorboard=False) as log:
        log.record("test", 0, split="test", no_metrics="--no-metrics")
        picture(tmp_path / "pictures" / f"00_{'ab' * 8}.jpg", 5)
        page = Page(keep_page(tmp_path, "t", log).read_text())
    assert len(page.sections) == 1 and page.cells == []


def test_what_fails_is_printed_and_does_not_end_a_run(tmp_path, capsys):
    training(tmp_path)
    (tmp_path / "eval/epoch_4/pictures" / f"00_{'ab' * 8}.jpg").write_bytes(b"damaged")
    with RunLog(tmp_path, is_main=True, resume_step=100, tensorboard=False) as log:
        assert keep_page(tmp_path, "t", log) is None
    line = capsys.readouterr().out
    assert line.startswith("no report.html of this run: ") and "not a picture that can be decoded" in line
    assert keep_page(tmp_path, "t", RunLog(tmp_path, is_main=False)) is None


def test_sentences(tmp_path):
    with pytest.raises(UserError, match=r"log\.jsonl: the log cannot be read"):
        write_run_page(tmp_path, "t")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(LogError, match="holds no training and no test to make a page of"):
        write_run_page(tmp_path, "t")


def test_pictures_of_an_earlier_evaluation_are_removed(tmp_path):
    training(tmp_path)
    folder = tmp_path / "eval" / "epoch_4"
    remove_pictures(folder)
    assert [path.name for path in (folder / "pictures").iterdir()] == ["of the user.jpg"]


def test_overwriting_a_run_removes_its_page(tmp_path):
    training(tmp_path)
    page = write_run_page(tmp_path, "t")
    remove_run(tmp_path)
    assert not page.exists() and (tmp_path / "eval/epoch_2/pictures/of the user.jpg").exists()
