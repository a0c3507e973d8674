"""AQR (adaptive query router): every query weighs the sensors by their tokens around its reference point.

A router is called as ``aqr(queries, tokens, cameras)`` between the queries and the decoder. It finds the windows of the
queries, lets the generator compute weights from the tokens there, and then changes either the cross-attention
(:class:`BiasRouter`) or the tokens (:class:`ModulationRouter`, the two earlier designs).

Shape letters: B batch, Q queries, K tokens, G grids (one a sensor), C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.aqr.lowrank import ENERGY, make_lowrank_attend
from cmt_aqr.aqr.modulation import modulate, render_map
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import (
    AttentionBias,
    Backend,
    QueryWindows,
    TokenLayout,
    WindowSettings,
    bias_values,
    make_attend,
    query_windows,
)
from cmt_aqr.attention.evaluate import choose_backend
from cmt_aqr.cameras import Cameras
from cmt_aqr.tokens import Queries, Tokens
from cmt_aqr.transformer_layers import Attend


@dataclass(frozen=True)
class Routed:
    """What the decoder reads, and what logs, pictures and inspection show.

    Attributes:
        tokens: keys and values of the cross-attention.
        attend: the cross-attention of all decoder layers: q (B, M, Q, D), k, v (B, M, K, D) -> (B, M, Q, D).
        windows: of the queries that have weights; None without AQR.
        weights: (B, Q', G), one for every grid, of the Q' queries that have windows, the last ones of all; None without
            AQR.
        bias: what ``attend`` adds to the scores; None without AQR and in its earlier designs.
    """

    tokens: Tokens
    attend: Attend = F.scaled_dot_product_attention
    windows: QueryWindows | None = None
    weights: Tensor | None = None
    bias: AttentionBias | None = None


def find_windows(
    reference_points: Tensor,
    layout: TokenLayout,
    cameras: Cameras | None,
    *,
    point_range: Sequence[float],
    settings: WindowSettings,
) -> QueryWindows:
    """Windows of reference points (B, Q, 3) in all grids.

    Raises:
        ValueError: window sizes that are not those of the grids, in their order, which is the order of the weights.
    """
    names = [grid.name for grid in layout.grids]
    if names != list(settings.sizes):
        raise ValueError(f"AQR with windows for {list(settings.sizes)} cannot weigh tokens of the grids {names}")
    return query_windows(
        reference_points,
        None if cameras is None else cameras.lidar2img,
        layout=layout,
        point_range=point_range,
        image_size=None if cameras is None else cameras.image_size,
        settings=settings,
    )


def mean_weights(weights: Tensor, settings: WindowSettings) -> dict[str, Tensor]:
    """For the log, 0-dim: mean |weight| of every sensor over the weights (B, Q, G).

    ``weights`` are of the matching queries (``Predictions.aqr_weights``): those of padding queries are meaningless.
    """
    means = weights.abs().mean(dim=(0, 1))
    return {f"aqr_weight_{name}": mean for name, mean in zip(settings.sizes, means, strict=True)}


class BiasRouter(nn.Module):
    """The design ``bias``: weights become a bias in the cross-attention, inside the windows.

    Denoising queries are queries like all others: they have windows, weights and a bias of their own.

    Args:
        generator: of the weights.
        windows: size and kind of the windows; the sizes in the order of the grids.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        scale: factor between weights and bias.
        max_bias: the bias is clamped to +-this; None: not clamped.
        backend: evaluator of the attention with the bias (``attention.attend``); ``lowrank`` is a comparison that gives
            the bias no gradient, so it is not for training.
        lowrank_energy: of ``lowrank``, how much of the bias it keeps.
    """

    NEUTRAL_WEIGHT = 0.0  # no bias

    def __init__(
        self,
        *,
        generator: WeightGenerator,
        windows: WindowSettings,
        point_range: Sequence[float],
        scale: Scale,
        max_bias: float | None,
        backend: Backend | Literal["lowrank"] = "auto",
        lowrank_energy: float = ENERGY,
    ) -> None:
        super().__init__()
        self.settings = windows
        self.point_range = tuple(point_range)
        self.max_bias = max_bias
        self.backend = backend
        self.lowrank_energy = lowrank_energy
        self.generator = generator
        self.scale = scale

    def find_windows(self, queries: Queries, layout: TokenLayout, cameras: Cameras | None) -> QueryWindows:
        """Windows of all queries."""
        return find_windows(
            queries.reference_points, layout, cameras, point_range=self.point_range, settings=self.settings
        )

    def forward(
        self, queries: Queries, tokens: Tokens, cameras: Cameras | None, windows: QueryWindows | None = None
    ) -> Routed:
        """The tokens as they are, and the attention with the bias clamp(scale * weight) in the windows.

        Args:
            windows: of :meth:`find_windows`; None: computed here.
        """
        if windows is None:
            windows = self.find_windows(queries, tokens.layout, cameras)
        weights = self.generator(queries.positions, tokens.values, tokens.positions, windows)
        bias = AttentionBias(windows, bias_values(weights, self.scale(), self.max_bias))
        if self.backend == "lowrank":
            attend_with_lse = make_lowrank_attend(bias, energy=self.lowrank_energy)
        else:
            attend_with_lse = make_attend(bias, backend=self.backend)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_with_lse(q, k, v)[0]

        return Routed(tokens, attend, windows, weights, bias)

    def token_length(self, layout: TokenLayout, device: torch.device) -> int:
        """Length of the token axis that suits the attention: flex is faster with zeros up to whole blocks."""
        is_flex = self.evaluator(device) == "flex"
        return layout.padded_length if is_flex else layout.num_tokens

    def evaluator(self, device: torch.device) -> str:
        """What the backend means on this device."""
        return self.backend if self.backend == "lowrank" else choose_backend(self.backend, device)

    def clamp_parameters(self) -> None:
        """Move the scale back inside its limits; to be called after every optimizer step."""
        self.scale.clamp_()

    def describe(self, device: torch.device) -> str:
        """One sentence for the log, with the evaluator that the backend means on this device."""
        chosen = self.evaluator(device)
        picked = f"{chosen} (picked by auto)" if self.backend == "auto" else chosen
        return f"AQR bias in the cross-attention, computed by {picked}"

    def metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """Numbers for the log, 0-dim: :func:`mean_weights`, and the scale of this forward pass."""
        return mean_weights(weights, self.settings) | {"aqr_scale": self.scale().detach()[0]}


class ModulationRouter(nn.Module):
    """The designs ``v1`` and ``v2``: weights modulate token features (``modulation.py``); the attention is plain.

    Denoising queries are left out of the maps: they lie at ground-truth boxes, which the maps would reveal to the
    matching queries.

    Args:
        design: how a map changes features.
        generator: of the weights.
        windows, point_range: as in :class:`BiasRouter`.
    """

    NEUTRAL_WEIGHT = 1.0  # a factor of 1

    def __init__(
        self,
        *,
        design: Literal["v1", "v2"],
        generator: WeightGenerator,
        windows: WindowSettings,
        point_range: Sequence[float],
    ) -> None:
        super().__init__()
        self.design = design
        self.settings = windows
        self.point_range = tuple(point_range)
        self.generator = generator

    def find_windows(self, queries: Queries, layout: TokenLayout, cameras: Cameras | None) -> QueryWindows:
        """Windows of the matching queries."""
        points = queries.reference_points[:, queries.num_dn :]
        return find_windows(points, layout, cameras, point_range=self.point_range, settings=self.settings)

    def forward(
        self, queries: Queries, tokens: Tokens, cameras: Cameras | None, windows: QueryWindows | None = None
    ) -> Routed:
        """Tokens modulated by the map of the matching queries' weights, and PyTorch's own attention.

        Args:
            windows: of :meth:`find_windows`; None: computed here.
        """
        if windows is None:
            windows = self.find_windows(queries, tokens.layout, cameras)
        weights = self.generator(queries.positions[:, queries.num_dn :], tokens.values, tokens.positions, windows)
        values = modulate(tokens.values, render_map(windows, weights), self.design)
        return Routed(replace(tokens, values=values), windows=windows, weights=weights)

    def token_length(self, layout: TokenLayout, device: torch.device) -> int:
        """Length of the token axis: that of the layout on every device."""
        return layout.num_tokens

    def clamp_parameters(self) -> None:
        """Nothing: no parameter has limits."""

    def describe(self, device: torch.device) -> str:
        """One sentence for the log."""
        return f"AQR {self.design}: weights modulate the token features"

    def metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """Numbers for the log, 0-dim: :func:`mean_weights`."""
        return mean_weights(weights, self.settings)
