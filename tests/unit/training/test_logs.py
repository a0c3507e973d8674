"""The run log: what is written, what a resume keeps, what is shown where."""

import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from cmt_aqr.training import logs
from cmt_aqr.training.logs import LogError, RunLog, duration, read_log


class Clock:
    """Stands in for ``time.monotonic``."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quiet(path, **options):
    return RunLog(path, True, tensorboard=False, **options)


def test_lines_are_json_and_written_at_once(tmp_path):
    with quiet(tmp_path / "deep" / "run") as log:
        log.record("train", 10, epoch=0, lr=1e-4, losses={"cls": torch.tensor(2.0), "bbox": 0.5}, grad_norm=math.inf)
        (line,) = read_log(log.path)
        log.record("eval", 10, mAP=np.float32(0.25), AVE=math.nan, note="first", none=None)
        lines = read_log(log.path)
    assert line.pop("time") > 1.6e9
    assert line == {
        "kind": "train", "step": 10, "epoch": 0, "lr": 1e-4, "losses": {"cls": 2.0, "bbox": 0.5}, "grad_norm": None,
    }  # fmt: skip
    assert lines[1]["mAP"] == 0.25
    assert lines[1]["AVE"] is None
    assert lines[1]["note"] == "first"


def test_new_run_keeps_the_older_log(tmp_path):
    for step in (1, 2, 3):
        with quiet(tmp_path) as log:
            log.record("train", step)
    assert {p.name: read_log(p)[0]["step"] for p in tmp_path.iterdir()} == {
        "log.1.jsonl": 1, "log.2.jsonl": 2, "log.jsonl": 3,
    }  # fmt: skip


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with quiet(tmp_path) as log:
        for step in (10, 20, 30):
            log.record("train", step, loss=float(step))
        log.record("eval", 20, mAP=0.5)
    with open(log.path, "a") as file:
        file.write('{"kind": "train", "st')
    with quiet(tmp_path, resume_step=20) as log:
        log.record("train", 21, loss=0.0)
    assert [(line["kind"], line["step"]) for line in read_log(log.path)] == [
        ("train", 10), ("train", 20), ("eval", 20), ("train", 21),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_resume_without_a_log_starts_one(tmp_path):
    with quiet(tmp_path, resume_step=20) as log:
        log.record("train", 21)
    assert len(read_log(log.path)) == 1


def test_other_processes_do_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", False) as log:
        log.record("train", 1, loss=1.0)
        log.print("hello")
        with log.progress("train", 10) as progress:
            progress.advance(loss=1.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_tensorboard_scalars_and_purge(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, True) as log:
        for step in (1, 2, 3):
            log.record("train", step, loss=float(step), losses={"cls": 0.5}, note="text")
    with RunLog(tmp_path, True, resume_step=2) as log:
        log.record("train", 3, loss=30.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/losses/cls"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_plain_lines_come_now_and_then(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with quiet(tmp_path, plain_period=10) as log, log.progress("epoch 1/2", total=100, done=10) as progress:
        for _ in range(25):
            clock.now += 1
            progress.advance(loss=2.0, lr=1.5e-4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == "epoch 1/2  20/100 (20.0 %)  loss 2  lr 0.00015  1 s/step  remaining 0:01:20"


def test_loss_is_smoothed_and_a_non_finite_one_left_out(tmp_path):
    with quiet(tmp_path) as log, log.progress("train", 10) as progress:
        for loss in (1.0, math.nan, 2.0):
            progress.advance(loss=loss)
        assert progress.loss == pytest.approx(1 + logs.SMOOTHING)
        assert progress.done == 3


def test_bar_on_a_terminal_and_lines_beside_it(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with quiet(tmp_path) as log, log.progress("epoch 1/2", total=4) as progress:
        progress.advance(2, loss=3.0)
        log.print("saved")
        progress.advance(2, loss=3.0)
    assert "epoch 1/2" in terminal.getvalue()
    assert capsys.readouterr().out == "saved\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (2 * 86400 + 61, "2 d 0:01:01")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_errors_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match=r"log\.jsonl: the log cannot be written: "):
        quiet(tmp_path / "file")
    with pytest.raises(LogError, match="the log cannot be read: No such file"):
        read_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(LogError, match=r"log\.jsonl: line 2 is no record of a log: 'nonsense'"):
        quiet(tmp_path, resume_step=1)
    with quiet(tmp_path / "run") as log, pytest.raises(ValueError, match="a log takes numbers, text") as mistake:
        log.record("train", 1, values=[1, 2])
    assert not isinstance(mistake.value, LogError)


def test_full_disk_is_one_sentence(tmp_path):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    log = quiet(tmp_path)
    text = f"{log.path}: the log cannot be written: No space left on device; the checkpoints are untouched"
    sentence = f"^{re.escape(text)}$"
    log._file.close()
    log._file = Full()
    with pytest.raises(LogError, match=sentence):
        log.record("train", 1)
    # Leaving the block fails once more; that must not hide which file it was.
    with pytest.raises(LogError, match=sentence), log:
        log.record("train", 1)


def test_a_failed_resume_leaves_the_log_whole(tmp_path, monkeypatch):
    with quiet(tmp_path) as log:
        for step in (1, 2, 3):
            log.record("train", step)
    before = log.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(LogError, match="the log cannot be written: No space left on device"):
            quiet(tmp_path, resume_step=1)
    assert log.path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_import_is_light():
    code = "import sys, cmt_aqr.training.logs; print([m for m in sys.modules if m.startswith('tensorboard')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.replace("'", '"')) == []


def test_a_full_disk_ends_tensorboard_and_nothing_else(tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path, True) as log:
        monkeypatch.setattr("cmt_aqr.training.tensorboard.ScalarWriter.add", full)
        log.record("train", 1, loss=1.0)
        log.record("train", 2, loss=2.0)
    out, err = capfd.readouterr()
    folder = tmp_path / "tensorboard"
    assert out == (
        f"{folder}: cannot be written: No space left on device; TensorBoard is off, log.jsonl has all numbers\n"
    )
    assert err == ""
    assert [line["loss"] for line in read_log(log.path)] == [1.0, 2.0]
