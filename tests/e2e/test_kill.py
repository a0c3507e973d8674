"""A few runs of the kill harness; all of them: python -m tests.e2e.faults.kill."""

import re
import subprocess
import sys

import pytest

from tests.e2e.conftest import REPOSITORY, one_thread

pytestmark = pytest.mark.e2e


def test_killed_runs_end_like_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "tests.e2e.faults.kill", "--moments", "5", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=one_thread(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random moments: 5 of 5 identical" in done.stdout
    # Four saves of two files, each written, synced and renamed; and old epochs removed.
    good, count = map(int, re.search(r"file operations of the saves: (\d+) of (\d+) identical", done.stdout).groups())
    assert good == count >= 24
