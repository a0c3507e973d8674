"""The errors that the parity tests achieve, as docs/parity.md.

    python -m tests.parity.report

Runs the tests of this folder and writes one row per golden file and stage: the largest relative error of all
comparisons, in float64 and in float32. Exit status: that of the tests, 2 where
there is no golden file. `CMT_AQR_GOLDEN` names another golden folder.
"""

import argparse
import importlib.metadata
import math
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import pytest
import torch

from tests.parity.golden import MEASUREMENTS, REPOSITORY, Measurement, golden_dir

COMMAND = "python -m tests.parity.report"
PACKAGES = ("numpy", "scipy", "opencv-python-headless", "opencv-python", "pillow", "spconv", "spconv-cu121")


class Outcomes:
    """pytest plugin: counts of outcomes, and the reasons of skipped tests."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.skipped: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: its call, or the setup that skipped or broke it."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.counts[report.outcome] += 1
            if report.skipped:
                self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1


def main() -> int:
    """Run the command line; returns the exit status of the tests."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "parity.md", help="default: docs/parity.md")
    options = parser.parse_args()
    outcomes = Outcomes()
    status = pytest.main([str(Path(__file__).parent), "-q"], plugins=[outcomes])
    if not MEASUREMENTS:
        print(f"error: no golden file in {golden_dir()} (set CMT_AQR_GOLDEN); nothing written", file=sys.stderr)
        return int(status) or 2
    options.out.write_text(format_report(MEASUREMENTS, outcomes), encoding="utf-8")
    print(f"written: {options.out}")
    return int(status)


def format_report(measurements: Iterable[Measurement], outcomes: Outcomes) -> str:
    """The whole page."""
    measurements = list(measurements)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.counts.items()))
    exact = sum(m.limit == 0 for m in measurements)
    lines = [
        "# Parity with the original programs",
        "",
        f"Written by `{COMMAND}` on {date.today()}; do not edit. Tests: {counts}. Comparisons: {len(measurements)}, "
        f"of which {exact} ask for equality.",
        "",
        f"Versions: {versions()}, CPU.",
        "",
        "The golden files hold inputs, weights and outputs of the original programs at reduced sizes, run in exact",
        "arithmetic in float32 and float64. An error is max |ours - reference| / max |reference|; the reference is the",
        "original's float64 run, for our float64 and for our float32. A row gives the largest error of all comparisons",
        "of its stage and, in brackets, its limit. The last column is the error of the original's own float32 run",
        "against its float64 run, where the file has both. *equal*: every element is the same. *float32 there*: the",
        "original computes or stores this stage in float32 in both runs, so float64 cannot come closer than that.",
        "What is the same and what is different on purpose: [quirks.md](quirks.md). The same stages on a GPU, in",
        "float32 and under bfloat16 autocast, error per stage: [parity_gpu.md](parity_gpu.md).",
    ]
    for reason, count in outcomes.skipped.items():
        lines += ["", f"Skipped ({count}): {reason}"]
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.golden].append(measurement)
    for name in sorted(groups):
        lines += ["", f"## {name}", "", "| stage | comparisons | float64 | float32 | original's float32 |"]
        lines += ["|---|---|---|---|---|", *format_rows(groups[name])]
    lines += ["", "## Files without a comparison", ""]
    lines += [f"- `{name}`: no test read it" for name in unread_files(groups)] or ["None."]
    return "\n".join(lines) + "\n"


def format_rows(measurements: Iterable[Measurement]) -> list[str]:
    """One row per stage, in the order of the first comparison."""
    stages: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        stages[measurement.stage].append(measurement)
    rows = []
    for stage, members in stages.items():
        cells = [stage, str(len(members))]
        if all(m.limit == 0 for m in members):
            word = "equal" if all(m.error == 0 for m in members) else "**different**"
            cells += [word, word, ""]
        else:
            cells += [
                format_worst([m for m in members if m.dtype == dtype]) for dtype in (torch.float64, torch.float32)
            ]
            known = [m.original for m in members if m.original is not None]
            cells.append(f"{max(known):.1e}" if known else "")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def format_worst(members: list[Measurement]) -> str:
    """Largest error with the limit; bold where it is exceeded."""
    if not members:
        return ""
    worst = max(members, key=lambda m: math.inf if math.isnan(m.error) else m.error / m.limit)
    text = f"{worst.error:.1e} ({worst.limit:.0e})" if worst.error else "0"
    return text if worst.error <= worst.limit else f"**{text}**"


def unread_files(groups: Iterable[str]) -> list[str]:
    """Names of the folder's .npz files that no comparison belongs to."""
    return sorted({path.stem for path in golden_dir().glob("*.npz")} - set(groups))


def versions() -> str:
    """Interpreter and packages that the numbers depend on."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
