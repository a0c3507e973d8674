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
from cmt_aqr.training.logs import LogError, RunLog, read_log


class Clock:
    """Stands in for the clocks of the log and of tqdm."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


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
    with quiet(tmp_path, plain_period=10) as log, log.progress("train", total=100, done=10) as progress:
        for _ in range(25):
            clock.now += 1
            progress.advance(loss=2.0, lr=1.5e-4)
    assert capsys.readouterr().out.splitlines() == [  # the first after 3 s of measured steps
        "train: 14/100 (14.0 %), loss 2, lr 0.00015, 1.00step/s, remaining 01:26",
        "train: 24/100 (24.0 %), loss 2, lr 0.00015, 1.00step/s, remaining 01:16",
        "train: 34/100 (34.0 %), loss 2, lr 0.00015, 1.00step/s, remaining 01:06",
    ]


def test_the_first_step_is_no_measure_of_those_to_come(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with quiet(tmp_path) as log, log.progress("train", total=101) as progress:
        clock.now += 100  # compiles
        progress.advance()
        assert progress.line("first") == "first: 1/101 (1.0 %), ?step/s, remaining ?"
        for _ in range(4):
            clock.now += 2
            progress.advance()
        assert progress.line("fifth") == "fifth: 5/101 (5.0 %), 2.00s/step, remaining 03:12"
    assert capsys.readouterr().out == "train: 3/101 (3.0 %), 2.00s/step, remaining 03:16\n"


@pytest.mark.parametrize("steps_before", [2, 3, 8])  # between two lines, after one
def test_time_between_epochs_is_not_that_of_a_step(tmp_path, capsys, monkeypatch, steps_before):
    clock = Clock(monkeypatch)
    with quiet(tmp_path, plain_period=4) as log, log.progress("train", total=1000) as progress:
        for steps in (steps_before, 20):
            for _ in range(steps):
                clock.now += 2
                progress.advance()
            clock.now += 500  # an evaluation
            progress.restart_clock()
        rest = 1000 - steps_before - 20
        assert f"2.00s/step, remaining {rest * 2 // 60:02d}:{rest * 2 % 60:02d}" in progress.line("train")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 9 and all(", 2.00s/step, " in line for line in lines)


def test_the_time_that_remains_follows_the_speed(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with quiet(tmp_path, plain_period=3) as log, log.progress("train", total=10_000) as progress:
        for seconds, steps in ((1, 20), (3, 100)):
            for _ in range(steps):
                clock.now += seconds
                progress.advance()
        assert "3.00s/step" in progress.line("train")


def test_the_loss_is_a_mean_from_the_first_step_on(tmp_path):
    with quiet(tmp_path) as log, log.progress("train", 10) as progress:
        assert progress.loss is None
        progress.advance(loss=1.0)
        assert progress.loss == pytest.approx(1.0)
        progress.advance(loss=math.nan)
        progress.advance(loss=torch.tensor(2.0))
        # Not 1.02: the first step counts no more than the second.
        assert progress.loss == pytest.approx((0.98 * 1 + 2) / 1.98)
        assert progress.line("epoch 1/2", loss=1.5).startswith("epoch 1/2: 3/10 (30.0 %), loss 1.5, ")


def test_bar_on_a_terminal_and_lines_beside_it(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with quiet(tmp_path) as log, log.progress("train", total=6) as progress:
        progress.advance(2, loss=3.0)
        log.print("saved")
        clock.now += 4
        progress.advance(2, loss=3.0)
        assert re.search(r"train: +67%.* 4/6 \[00:04<00:04, +2\.00s/step, loss=?:? ?3\]", terminal.getvalue())
    assert capsys.readouterr().out == "saved\n"


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
