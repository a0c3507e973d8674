"""Where chosen queries attend, token by token, with the bias of AQR and without: what ``visualize`` draws.

Shape letters: B batch, M heads, K tokens, D channels of a head, N chosen queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.attention import AttentionBias, QueryWindows
from cmt_aqr.attention.dense import dense_bias
from cmt_aqr.attention.grids import Grid
from cmt_aqr.classes import CLASSES
from cmt_aqr.found import Found
from cmt_aqr.inspection import Inspection, inspect
from cmt_aqr.models.detector import Detector
from cmt_aqr.viz.query_panels import GridMap, QueryMap


@dataclass
class MapRecorder:
    """Called with the projections of every layer; keeps the attention (N, K) of chosen queries of the one sample."""

    queries: Tensor
    plain: list[Tensor] = field(default_factory=list)
    biased: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, bias: AttentionBias | None, windows: QueryWindows) -> None:
        """Record one layer: q (1, M, Q, D), k (1, M, K, D or padded), bias or None."""
        k = k[:, :, : windows.layout.num_tokens].float()
        scores = q[:, :, self.queries].float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        self.plain.append(scores.softmax(dim=-1)[0].mean(dim=0))
        if bias is not None:
            cells = tuple(part[:, self.queries] for part in windows.cells)
            own = AttentionBias(QueryWindows(windows.layout, windows.settings, cells), bias.values[:, self.queries])
            scores = scores + dense_bias(own)[:, None].float()
        self.biased.append(scores.softmax(dim=-1)[0].mean(dim=0))


def query_maps(
    model: Detector, images: Tensor, points: list[Tensor], lidar2img: Tensor, found: Found, count: int
) -> list[QueryMap]:
    """The attention of the queries of the best detections of one sample, mean over heads and layers.

    Args:
        model: in evaluation mode, with AQR and both sensors.
        images, points, lidar2img: of one sample, see :meth:`Detector.forward`.
        found: its detections; of two with one query the better is taken.
        count: how many queries.
    """
    numbers = list({query: i for i, query in reversed(list(enumerate(found.queries.tolist())))}.values())
    numbers = sorted(numbers)[:count]
    recorder = MapRecorder(found.queries[numbers].to(images.device))
    seen = inspect(model, images, points, lidar2img, with_attention=False, record=recorder)
    plain, biased = (torch.stack(part).mean(dim=0).cpu().numpy() for part in (recorder.plain, recorder.biased))
    return [_query_map(seen, found, number, plain[i], biased[i]) for i, number in enumerate(numbers)]


def _query_map(seen: Inspection, found: Found, number: int, plain: np.ndarray, biased: np.ndarray) -> QueryMap:
    """The maps of one detection from its attention (K,)."""
    windows = seen.windows
    bev, camera = windows.layout.grids
    query = int(found.queries[number])
    parts = [np.split(shares, [bev.num_tokens]) for shares in (plain, biased)]
    on_bev = GridMap(*(part[0].reshape(bev.rows, bev.cols) for part in parts), _window(windows, 0, bev, query))
    by_view = [part[1].reshape(camera.views, camera.rows, camera.cols) for part in parts]
    view = int(windows.cells[1][0, query, 0, 0])
    window = _window(windows, 1, camera, query) if view >= 0 else None
    view = view if view >= 0 else int(by_view[1].sum(axis=(1, 2)).argmax())
    on_camera = GridMap(by_view[0][view], by_view[1][view], window)
    name = CLASSES[int(found.detections.labels[number])].replace("_", " ")
    sensors = (("LiDAR", on_bev), ("cameras", on_camera))
    words = [f"{sensor} {_words(seen, query, i)}, {_sums(parts, i, grid)}" for i, (sensor, grid) in enumerate(sensors)]
    caption = f"{name} {float(found.detections.scores[number]):.2f}:   {';   '.join(words)}"
    box = found.detections.boxes[number].double().numpy()
    return QueryMap(caption, box, on_bev, bev.origin, bev.cell_size, on_camera, view)


def _words(seen: Inspection, query: int, grid: int) -> str:
    weight = float(seen.weights[0, query, grid])
    if math.isnan(weight):
        return "without a window"
    bias = "" if seen.bias is None else f", bias {float(seen.bias[0, query, grid]):+.2f}"
    return f"weight {weight:+.2f}{bias}"


def _sums(parts: Sequence[Sequence[np.ndarray]], number: int, grid: GridMap) -> str:
    """The share of a sensor, and that inside the window, without the bias and with it."""
    text = f"attention {_change(*(part[number].sum() for part in parts))}"
    if grid.window is None:
        return text
    row, col, row_end, col_end = grid.window
    inside = (shares[row:row_end, col:col_end].sum() for shares in (grid.plain, grid.biased))
    return f"{text}, in the window {_change(*inside)}"


def _change(plain: float, biased: float) -> str:
    return f"{100 * plain:.0f} % \N{RIGHTWARDS ARROW} {100 * biased:.0f} %"


def _window(windows: QueryWindows, number: int, grid: Grid, query: int) -> tuple[int, int, int, int] | None:
    """First row and column, and those after the last, of the first window of a query in a grid."""
    view, row, col = windows.cells[number][0, query, 0].tolist()
    if view < 0:
        return None
    if not windows.settings.is_local:
        return 0, 0, grid.rows, grid.cols
    radius = windows.settings.radius(grid)
    return (
        max(row - radius, 0),
        max(col - radius, 0),
        min(row + radius + 1, grid.rows),
        min(col + radius + 1, grid.cols),
    )
