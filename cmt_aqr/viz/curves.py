"""Curves of training runs from the lines of their logs: loss, learning rate, scores, and what AQR's probe measured."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Lines = Sequence[Mapping]

# Okabe and Ito's colours, told apart by colour-blind people; more than six runs also differ in their line styles.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STROKES = ("-", "--", "-.")
# Number of neighbouring logged losses whose mean is the smoothed loss.
SMOOTHED = 9


class _Run(NamedTuple):
    """One run in the picture."""

    lines: Lines
    colour: str
    stroke: str


class _Panel(NamedTuple):
    """One pair of axes: its title, the label of its y axis, the metric without which it is left out, how to draw."""

    title: str
    unit: str
    metric: tuple[str, ...]
    draw: Callable[[Axes, _Run], None]


def series(lines: Lines, kind: str, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of one metric.

    Args:
        lines: of a ``log.jsonl``.
        kind: train, eval or probe.
        keys: name of the metric, and of its part where it has some: ``bias_lidar``, ``mean``.

    Returns:
        Two float64 arrays of one length; lines without the metric are left out, null is NaN.
    """
    epochs, values = [], []
    for line in lines:
        value = line if line["kind"] == kind else None
        for key in keys:
            value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING or "epoch" not in line:
            continue
        epochs.append(line["epoch"])
        values.append(np.nan if value is None else value)
    return np.array(epochs, np.float64), np.array(values, np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over ``SMOOTHED`` neighbours, fewer at the ends; NaN is left out."""
    half = SMOOTHED // 2
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate(([0.0], np.where(known, values, 0))))
    counts = np.cumsum(np.concatenate(([0], known)))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def curves_figure(runs: Mapping[str, Lines], title: str = "") -> Figure:
    """A panel for each metric that at least one run has logged; ``runs``: name -> log, each with a colour of its own.

    Raises:
        ValueError: none of the logs has a line of training, evaluation or probe.
    """
    panels = [panel for panel in _PANELS if any(_has(lines, panel.metric) for lines in runs.values())]
    if not panels:
        raise ValueError("no log has a line of training, evaluation or probe")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(11.5, 0.9 + 2.9 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    strokes = [stroke for stroke in _STROKES for _ in _COLOURS]
    marks = list(zip(runs, cycle(_COLOURS), cycle(strokes)))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        for name, colour, stroke in marks:
            panel.draw(axis, _Run(runs[name], colour, stroke))
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.set_ylabel(panel.unit, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("epoch")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=colour, ls=stroke, linewidth=2, label=name) for name, colour, stroke in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def draw_curves(runs: Mapping[str, Lines], path: Path, *, title: str = "") -> Path:
    """Write :func:`curves_figure` as a picture, 1610 pixels wide."""
    curves_figure(runs, title).savefig(path)
    return path


def _draw_loss(axis: Axes, run: _Run) -> None:
    epochs, losses = series(run.lines, "train", "loss")
    axis.plot(epochs, losses, color=run.colour, linestyle=run.stroke, linewidth=0.8, alpha=0.35)
    axis.plot(epochs, smoothed(losses), color=run.colour, linestyle=run.stroke, linewidth=1.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def _draw_scores(axis: Axes, run: _Run) -> None:
    for key, marker in (("mAP", "o"), ("NDS", "s")):
        epochs, values = series(run.lines, "eval", key)
        axis.plot(epochs, values, color=run.colour, linestyle=run.stroke, marker=marker, markersize=5)
    axis.set_ylim(bottom=0)


def _draw_one(kind: str, *keys: str) -> Callable[[Axes, _Run], None]:
    def draw(axis: Axes, run: _Run) -> None:
        marker = "o" if kind == "probe" else None
        epochs, values = series(run.lines, kind, *keys)
        axis.plot(epochs, values, color=run.colour, linestyle=run.stroke, linewidth=1.8, marker=marker, markersize=4)

    return draw


def _draw_spread(key: str) -> Callable[[Axes, _Run], None]:
    """Mean as a line, a band of one standard deviation, smallest and largest as thin lines."""

    def draw(axis: Axes, run: _Run) -> None:
        (epochs, mean), (_, std) = series(run.lines, "probe", key, "mean"), series(run.lines, "probe", key, "std")
        axis.plot(epochs, mean, color=run.colour, linestyle=run.stroke, linewidth=1.8, marker="o", markersize=4)
        axis.fill_between(epochs, mean - std, mean + std, color=run.colour, alpha=0.2, linewidth=0)
        for part in ("min", "max"):
            axis.plot(*series(run.lines, "probe", key, part), color=run.colour, linestyle=":", linewidth=1)
        axis.axhline(0, color="black", linewidth=0.6)

    return draw


def _has(lines: Lines, metric: tuple[str, ...]) -> bool:
    return len(series(lines, *metric)[0]) > 0


_MISSING = object()
_SPREAD = "mean, band: one std, dotted: min, max"
_BIAS = "added to attention scores"
_CHANGE = "sum |softmax(s+b) - softmax(s)|"


def _single(title: str, unit: str, *metric: str) -> _Panel:
    return _Panel(title, unit, metric, _draw_one(*metric))


_PANELS = (
    _Panel("loss (strong: running mean)", "loss, log scale", ("train", "loss"), _draw_loss),
    _single("learning rate", "learning rate", "train", "lr"),
    _Panel("validation scores (circle mAP, square NDS)", "score, 0 to 1", ("eval", "mAP"), _draw_scores),
    _single("gradient norm, before clipping", "norm", "train", "grad_norm"),
    _Panel(f"AQR bias of LiDAR ({_SPREAD})", _BIAS, ("probe", "bias_lidar", "mean"), _draw_spread("bias_lidar")),
    _Panel(f"AQR bias of cameras ({_SPREAD})", _BIAS, ("probe", "bias_camera", "mean"), _draw_spread("bias_camera")),
    _single("AQR scale", "factor of the weights", "probe", "scale"),
    _single("AQR change of the attention, mean of all layers", _CHANGE, "probe", "attention_change"),
)
