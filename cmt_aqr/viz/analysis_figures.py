"""Figures of what AQR does, from the summaries of ``tools/analyze``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind people.
_COLOURS = {"lidar": "#0072B2", "camera": "#D55E00"}
_NAMES = {"lidar": "LiDAR", "camera": "cameras"}
_CHANGE = "#009E73"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_weights(variants: Mapping[str, dict], path: Path, *, title: str) -> Path:
    """Box plots of w_lidar and w_camera: for each failure, then for the clean frames by class, distance and condition.

    A box reaches from the first to the third quartile with a line at the median, whiskers from the 5th to the 95th
    percentile.
    """
    clean = next(iter(variants.values()))["weights"]
    panels = {
        "by failure": {
            name: {sensor: variant["weights"][sensor]["all"] for sensor in _COLOURS}
            for name, variant in variants.items()
        }
    }
    for key in ("by_class", "by_distance", "by_condition"):
        panels[f"clean, {key.replace('_', ' ')}"] = {
            group: {sensor: clean[sensor][key][group] for sensor in _COLOURS}
            for group in clean["lidar"][key]
            if any(clean[sensor][key][group]["count"] for sensor in _COLOURS)
        }
    rows = [len(groups) for groups in panels.values()]
    figure = _figure(9, 2.4 + 0.42 * sum(rows))
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=[count + 1 for count in rows])
    for axis, (name, groups) in zip(axes, panels.items(), strict=True):
        _draw_groups(axis, groups)
        axis.set_title(name, fontsize=11, loc="left")
    axes[-1].set_xlabel(
        "weight of a sensor: above 0 raises its attention in the query's window, below 0 lowers it\n"
        "bar: middle half of the objects (their number in brackets), stroke: median, line: 5 to 95 %"
    )
    figure.suptitle(f"{title}: AQR weights of detected objects", fontsize=12)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    return path


def _draw_groups(axis: Axes, groups: Mapping[str, Mapping[str, dict]]) -> None:
    for row, summaries in enumerate(groups.values()):
        for offset, (sensor, found) in zip((-0.17, 0.17), summaries.items(), strict=True):
            colour, label = _COLOURS[sensor], f"w_{sensor} ({_NAMES[sensor]})" if row == 0 else None
            axis.barh(row + offset, 0, color=colour, label=label)
            if not found["count"]:
                continue
            axis.plot([found["q05"], found["q95"]], [row + offset] * 2, color=colour, linewidth=1)
            width = found["q75"] - found["q25"]
            axis.barh(row + offset, width, 0.28, left=found["q25"], color=colour, alpha=0.55)
            axis.plot([found["q50"]] * 2, [row + offset - 0.14, row + offset + 0.14], color=colour, linewidth=2.5)
    counts = [summaries["lidar"]["count"] for summaries in groups.values()]
    names = [f"{name}  ({count})" for name, count in zip(groups, counts, strict=True)]
    axis.set_yticks(range(len(groups)), names, fontsize=9)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_attention(variants: Mapping[str, dict], path: Path, *, title: str) -> Path:
    """By variant and decoder layer: share of the attention on each sensor and in its windows, and the bias's effect."""
    shown = {name: variant["attention_by_layer"] for name, variant in variants.items() if variant["attention_by_layer"]}
    figure = _figure(11, 1.4 + 2.1 * max(len(shown), 1))
    axes = np.atleast_2d(figure.subplots(max(len(shown), 1), 3, squeeze=False, sharey="col"))
    for row, (name, layers) in zip(axes, shown.items(), strict=False):
        for axis, key in zip(row, ("mass", "window_mass"), strict=False):
            _draw_mass(axis, layers, key)
        changes = [layer["change"][0] for layer in layers]
        row[2].bar(range(len(layers)), changes, color=_CHANGE)
        row[0].set_ylabel(name, fontsize=9)
        for axis in row:
            axis.set_xticks(range(len(layers)), [str(i) for i in range(len(layers))])
            axis.spines[["top", "right"]].set_visible(False)
    for axis, text in zip(axes[0], ("share of the attention", "share inside the windows",
                                    "change, sum |softmax(s+b) - softmax(s)|"), strict=True):  # fmt: skip
        axis.set_title(text, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("decoder layer")
    figure.suptitle(
        f"{title}: cross-attention of detected objects, with the bias (full) and without (pale)", fontsize=12
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    return path


def _draw_mass(axis: Axes, layers: Sequence[dict], key: str) -> None:
    for number, (sensor, colour) in enumerate(_COLOURS.items()):
        for part, (name, alpha) in enumerate(((f"plain_{key}", 0.35), (key, 1.0))):
            places = np.arange(len(layers)) + (number - 0.5) * 0.4 + (part - 0.5) * 0.18
            label = f"{_NAMES[sensor]}, {'with' if part else 'without'} the bias"
            axis.bar(places, [layer[name][number] for layer in layers], 0.17, color=colour, alpha=alpha, label=label)
