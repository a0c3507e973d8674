"""What a test under failing sensors found: the records, the table, failures.json and failures.png.

RA = NDS / clean NDS is the resistance; MultiCorrupt's mRA is its mean over severities and corruptions.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmt_aqr.config import Config
from cmt_aqr.data.failures import CASES, OUTSIDE_MRA, SUITES, Failure
from cmt_aqr.evaluation.nuscenes_eval import Metrics
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.files import atomic_path
from cmt_aqr.viz.failure_bars import Bar, draw_bars

REPORT_FILE, BARS_FILE = "failures.json", "failures.png"
CLEAN = "clean"
# mRA of CMT without snow, from the published table (MultiCorrupt, 2402.11677).
PUBLISHED_MRA = 0.880


@dataclass(frozen=True)
class FailureTest:
    """What to test: failures on a split, all random numbers from one seed."""

    split: str
    failures: tuple[Failure, ...]
    seed: int


@dataclass(frozen=True)
class Row:
    """One line of the table; ``failure`` None is the clean one."""

    failure: Failure | None
    metrics: Metrics

    @property
    def name(self) -> str:
        """Of the failure."""
        return CLEAN if self.failure is None else self.failure.name


def resistance(row: Row, clean: Row) -> float:
    """RA = NDS / clean NDS; NaN where the clean NDS is 0."""
    return row.metrics.nds / clean.metrics.nds if clean.metrics.nds > 0 else math.nan


def case_resistances(rows: Sequence[Row]) -> dict[str, float]:
    """Case -> mean RA over its severities, for cases of which all are there (``rows[0]`` is clean)."""
    means = {}
    for name, case in CASES.items():
        own = [row for row in rows[1:] if row.failure.case == name and row.failure.views is None]
        if {row.failure.level for row in own} >= set(case.bare or case.levels):
            means[name] = sum(resistance(row, rows[0]) for row in own) / len(own)
    return means


def mean_resistance(rows: Sequence[Row]) -> float | None:
    """MultiCorrupt's mRA over its corruptions without snow; None unless all of them were tested."""
    means = case_resistances(rows)
    wanted = [name for name in SUITES["multicorrupt"] if name not in OUTSIDE_MRA]
    return sum(means[name] for name in wanted) / len(wanted) if all(name in means for name in wanted) else None


def format_failures(rows: Sequence[Row], test: FailureTest) -> str:
    """The table: a line a failure and severity, the mean RA of each case, and mRA where it can be given."""
    clean = rows[0]
    width = max(len(row.name) for row in rows) + 2
    lines = [
        f"split {test.split}, {clean.metrics.num_samples} samples, {len(rows) - 1} failures, seed {test.seed}",
        f"{'failure':<{width}} {'NDS':>7} {'mAP':>7} {'RA':>7} {'drop of NDS':>12} {'of mAP':>8}",
    ]
    lines.append("-" * len(lines[-1]))
    means = case_resistances(rows)
    for number, row in enumerate(rows):
        cells = f"{row.name:<{width}} {row.metrics.nds:>7.4f} {row.metrics.mean_ap:>7.4f}"
        if row.failure is not None:
            drops = clean.metrics.nds - row.metrics.nds, clean.metrics.mean_ap - row.metrics.mean_ap
            cells += f" {_number(resistance(row, clean)):>7} {drops[0]:>12.4f} {drops[1]:>8.4f}"
        lines.append(cells)
        case = row.failure.case if row.failure else None
        is_last = number + 1 == len(rows) or rows[number + 1].failure.case != case
        if case in means and is_last and sum(r.failure is not None and r.failure.case == case for r in rows) > 1:
            lines.append(f"{f'  mean of {case}':<{width}} {'':>7} {'':>7} {_number(means[case]):>7}")
    mean = mean_resistance(rows)
    if mean is not None:
        lines.append(
            f"mRA over MultiCorrupt's corruptions but snow: {_number(mean)} (CMT on nuScenes val, the same nine: "
            f"{PUBLISHED_MRA:.3f})"
        )
    return "\n".join(lines)


def write_report(rows: Sequence[Row], test: FailureTest, config: Config, folder: Path) -> None:
    """Write ``failures.json`` and ``failures.png``.

    Raises:
        EvaluationError: the disk is full or cannot be written.
    """
    clean = rows[0]
    report = {
        "configuration": config.name,
        "split": test.split,
        "num_samples": clean.metrics.num_samples,
        "seed": test.seed,
        CLEAN: clean.metrics.scalars(),
        "failures": [
            {
                "name": row.name,
                "case": row.failure.case,
                "level": row.failure.level,
                "views": row.failure.views,
                "protocol": row.failure.definition.source,
                "RA": resistance(row, clean),
                "drop_NDS": clean.metrics.nds - row.metrics.nds,
                "drop_mAP": clean.metrics.mean_ap - row.metrics.mean_ap,
                **row.metrics.scalars(),
            }
            for row in rows[1:]
        ],
        "RA_of_cases": case_resistances(rows),
        "mRA": mean_resistance(rows),
        "mRA_without": list(OUTSIDE_MRA),
    }
    bars = [Bar(row.name, row.failure.definition.source, row.metrics.nds, row.metrics.mean_ap) for row in rows[1:]]
    try:
        with atomic_path(folder / REPORT_FILE) as part:
            part.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draw_bars(bars, clean.metrics.nds, clean.metrics.mean_ap, folder / BARS_FILE, title=config.name)
    except OSError as error:
        raise EvaluationError(f"{folder}: the report cannot be written: {error.strerror}") from error


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _without_nan(value: object) -> object:
    """The same nested dicts and lists with None for NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
