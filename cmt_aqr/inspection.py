"""Inspection of AQR: the weights of every query, and what the bias changes in the cross-attention of every layer.

Shape letters: B batch, L layers, Q queries, G grids (one a sensor), M heads, K tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.attention import AttentionBias, QueryWindows, bias_values
from cmt_aqr.attention.bias import is_inside
from cmt_aqr.attention.dense import dense_bias
from cmt_aqr.models.detector import Detector
from cmt_aqr.predictions import Predictions

# Queries whose attention to all tokens is in memory at a time.
QUERY_CHUNK = 64


@dataclass(frozen=True)
class LayerAttention:
    """Where a layer's cross-attention goes, mean over heads; "plain" is without the bias, with the same q and k.

    Attributes:
        change: (B, Q) sum over tokens of |softmax(s + b) - softmax(s)|: 0 where nothing changes, 2 at most.
        mass: (B, Q, G) share of the attention on each sensor.
        plain_mass: the same without the bias.
        window_mass: (B, Q, G) share inside the query's windows of each sensor.
        plain_window_mass: the same without the bias.
    """

    change: Tensor
    mass: Tensor
    plain_mass: Tensor
    window_mass: Tensor
    plain_window_mass: Tensor


@dataclass(frozen=True)
class Inspection:
    """One forward pass, as AQR sees it.

    Attributes:
        predictions: of the detector, unchanged by the inspection.
        weights: (B, Q, G) of AQR, order of the grids; NaN where a query has no window in a grid.
        bias: (B, Q, G) that is added in the windows; NaN as the weights; None for the designs without a bias.
        windows: of all queries.
        layers: one record a decoder layer; empty without ``with_attention``.
    """

    predictions: Predictions
    weights: Tensor
    bias: Tensor | None
    windows: QueryWindows
    layers: list[LayerAttention]


@torch.no_grad()
def inspect(
    model: Detector,
    images: Tensor,
    points: list[Tensor],
    lidar2img: Tensor,
    *,
    with_attention: bool = True,
    record: Callable[[Tensor, Tensor, AttentionBias | None, QueryWindows], None] | None = None,
) -> Inspection:
    """Run a detector with AQR and record its weights, bias, windows and attention.

    Args:
        model: in evaluation mode.
        images, points, lidar2img: see :meth:`Detector.forward`.
        with_attention: compute :class:`LayerAttention`, for which all scores are written out.
        record: called with the projected queries, keys, bias and windows of every layer.

    Raises:
        ValueError: a model without AQR.
    """
    if model.aqr is None:
        raise ValueError("a detector without AQR has no weights to look at")
    pv_maps, bev_map = model.encode_images(images), model.encode_points(points)
    cameras = model.make_cameras(pv_maps, lidar2img, tuple(images.shape[2:4]))
    tokens = model.make_tokens(bev_map, pv_maps, cameras)
    queries = model.make_queries(len(images), cameras, None)
    routed = model.route(queries, tokens, cameras)
    bias, layers = None, []
    if isinstance(model.aqr, BiasRouter):
        values = bias_values(routed.weights, model.aqr.scale(), model.aqr.max_bias)
        bias = AttentionBias(routed.windows, values)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if with_attention:
            layers.append(layer_attention(q, k, bias, routed.windows))
        if record is not None:
            record(q, k, bias, routed.windows)
        return routed.attend(q, k, v)

    predictions = model.decode(queries, replace(routed, attend=attend))
    is_there = torch.stack([(cells[..., 0] >= 0).any(dim=-1) for cells in routed.windows.cells], dim=-1)
    if not routed.windows.settings.is_local:
        is_there = torch.ones_like(is_there)
    shown = [None if x is None else torch.where(is_there, x, torch.nan) for x in (routed.weights, bias and bias.values)]
    return Inspection(predictions, *shown, routed.windows, layers)


def layer_attention(q: Tensor, k: Tensor, bias: AttentionBias | None, windows: QueryWindows) -> LayerAttention:
    """The record of one layer from its projected queries (B, M, Q, D) and keys (B, M, K, D), which may be padded."""
    layout, parts = windows.layout, []
    k = k[:, :, : layout.num_tokens].float()
    sizes = [grid.num_tokens for grid in layout.grids]
    for start in range(0, q.shape[2], QUERY_CHUNK):
        chosen = slice(start, min(start + QUERY_CHUNK, q.shape[2]))
        scores = q[:, :, chosen].float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        plain = scores.softmax(dim=-1)
        biased = plain if bias is None else (scores + dense_bias(bias, chosen)[:, None].float()).softmax(dim=-1)
        change = (biased - plain).abs().sum(dim=-1).mean(dim=1)
        masses = []
        for shares in (biased.mean(dim=1), plain.mean(dim=1)):
            by_grid = shares.split(sizes, dim=-1)
            masses.append(torch.stack([part.sum(dim=-1) for part in by_grid], dim=-1))
            inside = [(part * is_inside(windows, g, chosen)).sum(dim=-1) for g, part in enumerate(by_grid)]
            masses.append(torch.stack(inside, dim=-1))
        parts.append((change, masses[0], masses[2], masses[1], masses[3]))
    return LayerAttention(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))


def probe_metrics(inspections: Sequence[Inspection], scale: float | None) -> dict[str, float | dict[str, float]]:
    """Metrics of some frames for the log: weights and bias of every sensor, scale, change of the attention.

    Mean and standard deviation are over queries that have a window. ``attention_change`` is the mean of
    :attr:`LayerAttention.change` over queries and layers, ``attention_change_by_layer`` over queries.
    """
    metrics: dict[str, float | dict[str, float]] = {}
    names = [grid.name for grid in inspections[0].windows.layout.grids]
    for kind in ("weights", "bias"):
        if getattr(inspections[0], kind) is None:
            continue
        values = torch.cat([getattr(inspection, kind) for inspection in inspections])
        for name, own in zip(names, values.unbind(-1), strict=True):
            own = own[own.isfinite()]
            if len(own):
                spread = {"mean": own.mean(), "std": own.std(correction=0), "min": own.min(), "max": own.max()}
                metrics[f"{kind}_{name}"] = {key: value.item() for key, value in spread.items()}
    if scale is not None:
        metrics["scale"] = scale
    changes = torch.tensor([[layer.change.mean() for layer in each.layers] for each in inspections]).mean(dim=0)
    masses = torch.stack([torch.stack([layer.mass.mean(dim=(0, 1)) for layer in each.layers]) for each in inspections])
    metrics["attention_change"] = changes.mean().item()
    metrics["attention_change_by_layer"] = {str(i): change for i, change in enumerate(changes.tolist())}
    metrics["attention_mass"] = dict(zip(names, masses.mean(dim=(0, 1)).tolist(), strict=True))
    return metrics
