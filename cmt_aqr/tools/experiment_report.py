"""The table that compares the variants of a plan, from the results of its finished runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

from cmt_aqr.errors import UserError
from cmt_aqr.failure_report import CLEAN
from cmt_aqr.tools.experiment_plan import Plan, Variant
from cmt_aqr.tools.experiment_runner import result_file, run_folder

CONFIDENCE = 0.95
# Condition (clean or a failure's name) -> score.
Scores = dict[str, float]


def comparison_table(plan: Plan, out: Path, metric: str) -> str:
    """A Markdown table with a line for each condition and variant.

    Args:
        metric: ``NDS`` or ``mAP``.

    Raises:
        UserError: no run is finished, or a result cannot be read.
    """
    results = {variant.name: read_results(plan, out, variant, metric) for variant in plan.variants}
    conditions = list(dict.fromkeys(name for runs in results.values() for run in runs.values() for name in run))
    if not conditions:
        raise UserError(f"{out}: no run of the plan is finished")
    lines = [
        f"| condition | variant | seeds | {metric} | difference from {plan.reference} | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    reference = results[plan.reference]
    for condition in conditions:
        for variant, runs in results.items():
            if runs:
                own = reference if variant != plan.reference else {}
                lines.append(f"| {condition} | `{variant}` | {len(runs)} | {cells(runs, own, condition)} |")
    missing = [variant.name for variant in plan.variants if len(results[variant.name]) < len(variant.seeds)]
    if missing:
        lines += ["", f"Not all seeds are finished of {', '.join(missing)}."]
    return "\n".join(lines)


def read_results(plan: Plan, out: Path, variant: Variant, metric: str) -> dict[int, Scores]:
    """Seed -> scores, of the finished runs of a variant."""
    found = {}
    for seed in variant.seeds:
        path = result_file(plan, run_folder(out, variant, seed))
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            if plan.failures:
                rows = {CLEAN: content[CLEAN]} | {row["name"]: row for row in content["failures"]}
            else:
                rows = {CLEAN: {"NDS": content["nds"], "mAP": content["mean_ap"]}}
            found[seed] = {name: float(row[metric]) for name, row in rows.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no result of test.py: {error!r}; remove it and run the plan again") from None
    return found


def cells(runs: dict[int, Scores], reference: dict[int, Scores], condition: str) -> str:
    """Mean score, mean difference over common seeds, and half the width of its interval."""
    score = f"{mean(run[condition] for run in runs.values()):.4f}"
    common = [seed for seed in runs if seed in reference]
    if not common:
        return f"{score} | - | -"
    differences = [runs[seed][condition] - reference[seed][condition] for seed in common]
    width = half_width(differences)
    shown = "-" if math.isnan(width) else f"+-{width:.4f} ({len(common)} seeds)"
    return f"{score} | {mean(differences):+.4f} | {shown}"


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    quantile = student_t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(quantile * stdev(values) / math.sqrt(len(values)))
