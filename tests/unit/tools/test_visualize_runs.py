"""``visualize curves`` and ``visualize page``: names of runs, files, sentences."""

import cv2
import pytest

from cmt_aqr.tools.visualize import main, names_of_runs
from cmt_aqr.training.logs import RunLog


def training(folder, value: float = 1.0):
    with RunLog(folder, is_main=True, tensorboard=False) as log:
        log.record("train", 1, epoch=0.5, loss=value, lr=value, grad_norm=value)
        log.record("train", 2, epoch=1.0, loss=value, lr=value, grad_norm=value)
    return folder


def test_curves_of_folders_and_files(tmp_path, capsys):
    a, b = training(tmp_path / "a"), training(tmp_path / "b", 2.0)
    out = tmp_path / "new" / "c.png"
    assert main(["curves", str(a), str(b / "log.jsonl"), str(a), "--out", str(out), "--title", "two"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert cv2.imread(str(out)).shape[1] > 1600
    assert main(["curves", str(a), "--out", str(tmp_path / "c.svg")]) == 0
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    files = [tmp_path / name / "log.jsonl" for name in ("x/run", "y/run", "z")]
    assert names_of_runs(files[:1]) == ["run"]
    assert names_of_runs(files) == ["x/run", "y/run", f"{tmp_path.name}/z"]
    assert names_of_runs([tmp_path / "a" / name for name in ("log.jsonl", "log.1.jsonl")]) == [
        "a/log.jsonl",
        "a/log.1.jsonl",
    ]


def test_the_page_of_a_run(tmp_path, capsys):
    assert main(["page", str(training(tmp_path / "run"))]) == 0
    page = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert "<title>run</title>" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["curves", "{}/none"], "none: the log cannot be read: No such file or directory"),
        (["curves", "{}/empty"], "log.jsonl: the log of empty has no training, evaluation or probe to draw"),
        (["curves", "{}/run", "--out", "c.jpg"], "--out c.jpg: the name must end in .png or .svg"),
        (["curves", "{}/run", "--out", "{}/run/log.jsonl/c.png"], "c.png: the curves cannot be written: "),
        (["page", "{}/empty"], "log.jsonl: holds no training and no test to make a page of"),
        (["page", "{}/none"], "the log cannot be read"),
    ],
)
def test_sentences(tmp_path, capsys, arguments, sentence):
    training(tmp_path / "run")
    RunLog(tmp_path / "empty", is_main=True, tensorboard=False).close()
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
