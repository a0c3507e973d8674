"""What long tasks say: nothing for three seconds, then a bar on a terminal and lines elsewhere."""

import io
import sys
import time

import pytest

from cmt_aqr import progress
from cmt_aqr.progress import counted, make_bar, phase


class Clock:
    """Stands in for tqdm's clock and that of the phases."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(clock, seconds, items=10):
    for _ in counted(range(items), "index of train", total=items, unit="frame"):
        clock.now += seconds


def test_a_short_task_is_silent(clock, capsys):
    run(clock, 0.29)
    assert capsys.readouterr() == ("", "")


def test_a_long_one_says_how_far_it_is_in_a_file(clock, capsys):
    run(clock, 5, items=20)
    assert capsys.readouterr().err.splitlines() == [
        f"index of train: {n}/20 ({n * 5}.0 %), 5.00s/frame, remaining {(20 - n) * 5 // 60:02d}:{(20 - n) * 5 % 60:02d}"
        for n in (1, 4, 7, 10, 13, 16, 19)  # after 5 s, then every 15 s
    ]


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run(clock, 2, items=4)
    text = sys.stderr.getvalue()
    assert "index of train:  50%|" in text and "2/4 [00:04<00:04,  2.00s/frame]" in text
    assert "25%" not in text  # that was after 2 s


def test_only_the_main_process_talks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run(clock, 60)
    with phase("scoring"):
        clock.now += 60
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_is_not_wanted_counts_in_silence(clock, capsys):
    with make_bar("world", 2, "sample", is_shown=False) as bar:
        clock.now += 60
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_a_phase_says_what_it_does_while_it_does_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    seen = ""
    with phase("loading the tables of data/nuscenes"):
        for _ in range(100):
            time.sleep(0.05)
            seen += capsys.readouterr().err
            if seen:
                break
    assert seen == "loading the tables of data/nuscenes ...\n"
    assert capsys.readouterr().err == "loading the tables of data/nuscenes: done in 00:00\n"


def test_a_short_phase_is_silent_and_a_failed_one_is_not_called_done(clock, capsys):
    with phase("loading"):
        clock.now += 2.9
    with pytest.raises(ValueError, match="broken"), phase("loading"):
        clock.now += 60
        raise ValueError("broken")
    assert capsys.readouterr() == ("", "")
