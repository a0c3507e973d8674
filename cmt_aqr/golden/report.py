"""A comparison as text: a table, what is missing, the first differing element, and likely causes."""

import difflib
from collections import Counter

from cmt_aqr.golden.bundle import Source
from cmt_aqr.golden.catalogue import describe, stage_of
from cmt_aqr.golden.compare import Comparison, Row
from cmt_aqr.golden.measure import Element

# Stages of many tensors; the table sums up in one line those tensors that are within their limits.
BRIEF_STAGES = ("inputs", "weights", "gradients")
NUM_SHOWN = 5
HEADINGS = ("tensor", "shape", "max abs", "max rel", "ulp", "cosine", "differ", "limit", "")


def format_report(comparison: Comparison, a: Source, b: Source, causes: dict[str, list[str]]) -> str:
    """The whole report.

    Args:
        causes: name of a tensor -> its likely causes in words.
    """
    lines = [f"A: {describe_source(a)}", f"B: {describe_source(b)}"]
    lines += [f"limits: {describe_limits(a, b, comparison.factor)}; integers are equal", ""]
    lines += table(comparison)
    lines += missing(comparison, a, b)
    past = [row for row in comparison.rows if row.is_past]
    if not past:
        return "\n".join([*lines, "", f"all {len(comparison.rows)} tensors are within their limits"])
    stages = list(dict.fromkeys(stage_of(row.name) for row in past))
    lines += ["", f"{len(past)} of {len(comparison.rows)} tensors are past their limits, in {', '.join(stages)}"]
    lines += [f"first stage that differs: {comparison.first_stage}"]
    for row in past:
        if stage_of(row.name) == comparison.first_stage:
            lines += first_difference(row, a)
            lines += [f"    likely cause: {words}" for words in causes.get(row.name, [])]
    if not causes:
        lines.append("    likely cause: none of the known mistakes explains it")
    return "\n".join(lines)


def describe_source(source: Source) -> str:
    """Path, model and precision, and which evaluators computed it."""
    about = source.manifest
    parts = [about.get("config", {}).get("name"), source.precision]
    if "versions" in about:
        parts += [f"torch {about['versions']['torch']}", about["machine"].get("device")]
    parts += [f"{part} by {name}" for part, name in about.get("evaluators", {}).get(source.precision, {}).items()]
    return f"{source.path} ({', '.join(filter(None, parts))})"


def describe_limits(a: Source, b: Source, multiplier: float) -> str:
    """What the limits are, in words; ``multiplier``: of --factor."""
    times = "" if multiplier == 1 else f", times {multiplier:g} (--factor)"
    factor = a.manifest.get("tolerance_factor")
    if factor is None:
        return a.manifest.get("tolerance_source", "1e-5 of the largest value") + times
    precision = "bf16" if b.precision == "bf16" else "float32"
    error = f"the error of {precision} against float64"
    if a.manifest["tolerance_source"] != "measured":
        error = f"a typical error of {precision} (export float64 and float32 to measure this model's own)"
    return f"{factor} times {error}" + (", times 2^-26" if b.precision == "float64" else "") + times


def table(comparison: Comparison) -> list[str]:
    """One line for each tensor; in stages of many tensors one line for all that are within their limits."""
    cells, brief = [HEADINGS], Counter()
    for row in comparison.rows:
        if stage_of(row.name) in BRIEF_STAGES and not row.is_past:
            brief[stage_of(row.name)] += 1
        else:
            cells.append(table_row(row))
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    more = [f"{stage}: {count} tensors within their limits" for stage, count in brief.items()]
    return [line.rstrip() for line in lines] + more


def table_row(row: Row) -> tuple[str, ...]:
    """The cells of one tensor."""
    shape, outcome = "x".join(map(str, row.shape)) or "1", "PAST" if row.is_past else "ok"
    found = row.difference
    if found is None:
        return (row.name, shape, "", "", "", "", "", "", outcome)
    differ = str(max(found.past, row.unpaired)) if row.is_exact or found.past else ""
    if row.is_exact:
        return (row.name, shape, "", "", "", "", differ, "", outcome)
    figures = (f"{found.max_abs:.1e}", f"{found.max_rel:.1e}", f"{found.ulp:.3g}", f"{found.cosine:.9f}")
    return (row.name, shape, *figures, differ, f"{row.limit:.1e}", outcome)


def markdown(comparison: Comparison, a: Source, b: Source) -> str:
    """A Markdown table, one line for each stage: the tensor that is furthest apart, and how many integers differ."""
    lines = [
        f"{describe_source(a)} against {describe_source(b)}",
        "",
        "| stage | floats | largest error / largest value | of | lowest cosine | integers that differ |",
        "|---|---|---|---|---|---|",
    ]
    for stage in dict.fromkeys(stage_of(row.name) for row in comparison.rows):
        rows = [row for row in comparison.rows if stage_of(row.name) == stage]
        floats = [row for row in rows if not row.is_exact and row.difference is not None]
        exact = [row for row in rows if row.is_exact and row.difference is not None]
        differ = sum(max(row.difference.past, row.unpaired) for row in exact)
        count = sum(row.difference.count for row in exact)
        cells = [stage, str(len(floats)), "-", "-", "-", f"{differ:,} of {count:,}" if exact else "-"]
        if floats:
            worst = max(floats, key=lambda row: row.difference.max_rel)
            cells[2:4] = [f"{worst.difference.max_rel:.1e}", worst.name.partition("/")[2]]
            cells[4] = f"{min(row.difference.cosine for row in floats):.9f}"
        lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {row.name} | {row.problem} | | | | |" for row in rows if row.problem]
    return "\n".join(lines)


def missing(comparison: Comparison, a: Source, b: Source) -> list[str]:
    """What only one side has; a stage that is missing as a whole is named by the stage."""
    lines = []
    compared = {stage_of(row.name) for row in comparison.rows}
    whole = Counter(stage_of(name) for name in comparison.only_a if stage_of(name) not in compared)
    parts = [f"{stage} ({count} tensors)" for stage, count in whole.items()]
    parts += [name for name in comparison.only_a if stage_of(name) in compared]
    if parts:
        lines.append(f"not in B: {', '.join(parts)}")
    for name in comparison.only_b[:NUM_SHOWN]:
        close = difflib.get_close_matches(name, a.names, 1)
        hint = "" if describe(name) else "; no bundle has a tensor of this name"
        lines.append(f"not in A: {name}{hint}{f'; did you mean {close[0]}?' if close and hint else ''}")
    if len(comparison.only_b) > NUM_SHOWN:
        lines.append(f"not in A: {len(comparison.only_b) - NUM_SHOWN} more")
    return ["", *lines] if lines else []


def first_difference(row: Row, a: Source) -> list[str]:
    """The first element past its limit and the worst one, with axes and unit."""
    if row.problem:
        return [f"  {row.name}: {row.problem}"]
    entry = describe(row.name)
    about = "" if entry is None else "; ".join(filter(None, (f"axes {entry.axes}" if entry.axes else "", entry.frame)))
    unit = "" if entry is None else f" {entry.unit}"
    lines = []
    if row.unpaired:
        pairing = row.pairing
        sides = (("A", pairing.only_a, pairing.names_a), ("B", pairing.only_b, pairing.names_b))
        for side, only, names in sides:
            if len(only):
                first = ", ".join(map(str, names[only[0]].tolist()))
                lines.append(
                    f"  {row.name}: {len(only)} rows are in {side} only, the first is row {only[0]}: {first} ({about})"
                )
    found = row.difference
    if found.past:
        lines.append(f"  {row.name}{at(found.first, row)}: {values(found.first)}{unit} ({about})")
        if not row.is_exact:
            lines.append(f"    worst at {at(found.worst, row).strip()}: {values(found.worst)}")
        lines.append(f"    {found.past} of {found.count} elements are past the limit of {row.limit:.1e}")
    return lines


def at(element: Element, row: Row) -> str:
    """The index, with what identifies its row where rows are matched."""
    text = f" [{', '.join(map(str, element.index))}]"
    if row.pairing is None or not element.index:
        return text
    name = row.pairing.names_a[row.pairing.rows_a[element.index[0]]].tolist()
    return f"{text} (row {', '.join(map(str, name))})"


def values(element: Element) -> str:
    """Both values, with enough digits to tell them apart."""
    return f"{_number(element.a)} in A, {_number(element.b)} in B"


def _number(value: float) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
