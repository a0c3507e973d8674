"""Bar chart of the scores under sensor failures, beside those without a failure."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Okabe and Ito's colours, told apart by colour-blind people.
_COLOURS = {"MultiCorrupt": "#0072B2", "nuScenes-R": "#D55E00"}
_CLEAN, _POINT = "#000000", "#F0E442"


class Bar(NamedTuple):
    """One failure: its name, the protocol that defines it, and its scores in [0, 1]."""

    name: str
    protocol: str
    nds: float
    mean_ap: float


def draw_bars(bars: Sequence[Bar], clean_nds: float, clean_map: float, path: Path, *, title: str) -> Path:
    """Write a picture (PNG, 1600 pixels wide): NDS as bars, mAP as points, the clean scores as lines.

    Args:
        bars: from top to bottom.
        clean_nds, clean_map: scores without a failure.
        path: of the file; its folder exists.
        title: above the bars.
    """
    height = 1.9 + 0.26 * max(len(bars), 1)
    figure = Figure(figsize=(10, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = range(len(bars))
    limit = max(1.25 * max([clean_nds, clean_map, *(max(bar.nds, bar.mean_ap) for bar in bars)]), 0.05)
    colours = [_COLOURS.get(bar.protocol, "#777777") for bar in bars]
    axes.barh(rows, [bar.nds for bar in bars], color=colours, height=0.72)
    axes.plot([bar.mean_ap for bar in bars], rows, "o", color=_POINT, markeredgecolor="black", markersize=5)
    for row, bar in zip(rows, bars, strict=True):
        share = f"  RA {bar.nds / clean_nds:.2f}" if clean_nds > 0 else ""
        axes.text(max(bar.nds, bar.mean_ap) + 0.012 * limit, row, f"{bar.nds:.3f}{share}", va="center", fontsize=9)
    axes.axvline(clean_nds, color=_CLEAN, linewidth=1.5)
    axes.axvline(clean_map, color=_CLEAN, linewidth=1.2, linestyle=":")
    axes.set_yticks(list(rows), [bar.name for bar in bars], fontsize=10)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, limit)
    axes.set_xlabel("NDS (bars), mAP (points)")
    axes.set_title(f"{title}: scores under failing sensors", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    shown = {bar.protocol for bar in bars}
    handles = [Patch(color=colour, label=f"NDS, {name}") for name, colour in _COLOURS.items() if name in shown]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=_POINT, markeredgecolor="black", label="mAP"),
        Line2D([], [], color=_CLEAN, label=f"clean NDS {clean_nds:.3f}"),
        Line2D([], [], color=_CLEAN, linestyle=":", label=f"clean mAP {clean_map:.3f}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.savefig(path)
    return path
