"""A few runs of the kill harness; all of them: python -m tests.e2e.faults.kill."""

import subprocess
import sys

import pytest

from tests.e2e.conftest import REPOSITORY, one_thread

pytestmark = pytest.mark.e2e


def test_killed_runs_end_like_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "tests.e2e.faults.kill", "--moments", "4", "--save-phases", "12"]
    command += ["--torchrun-moments", "1", "--plain-torchrun", "0", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=one_thread(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "moment: 4 of 4 identical" in done.stdout
    # The first save, of two files, and the begin of the second.
    assert "operation: 12 of 12 identical" in done.stdout
    assert "| latest.pt: half of its bytes written | 1 | 1 |" in done.stdout
    assert "torchrun moment: 1 of 1 identical" in done.stdout
    assert list(tmp_path.iterdir()) == []
