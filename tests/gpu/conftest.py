"""Writes every finished test to a file at once (``--outcomes``), so that a run that is stopped loses nothing.

Where there are several GPUs, the processes of pytest-xdist take them in turn.
"""

import json
import os
from pathlib import Path

import pytest
import torch

OUTCOMES: dict[str, Path] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="append one JSON line per finished test to FILE")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Under xdist the main process gets the reports of all workers, and only there is the file known."""
    path = OUTCOMES.get("path")
    if path is None or (report.when != "call" and report.passed):
        return
    line = {
        "test": report.nodeid,
        "outcome": "failed" if report.failed else report.outcome,
        "seconds": round(report.duration, 1),
        "message": str(report.longrepr)[-3000:] if report.failed else "",
    }
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") and torch.cuda.device_count() > 1:
        worker = int(config.workerinput["workerid"].removeprefix("gw"))
        os.environ["CUDA_VISIBLE_DEVICES"] = str(worker % torch.cuda.device_count())
    if not hasattr(config, "workerinput") and config.getoption("--outcomes", None):
        OUTCOMES["path"] = Path(config.getoption("--outcomes"))
