"""AQR (adaptive query router): every query weighs the sensors by what it sees of them around itself.

Four steps, each a method that the detector calls: windows, weights, then either a bias for the cross-attention (design
``bias``) or modulated token features (designs ``v1`` and ``v2``).

Shape letters: B batch, V views, Q queries, K tokens, C channels.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cmt_aqr.aqr.modulation import modulate, render_map
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import (
    Attend,
    AttentionBias,
    Backend,
    QueryWindows,
    TokenLayout,
    WindowSettings,
    bias_strength,
    make_attend,
    query_windows,
)
from cmt_aqr.attention.evaluate import choose_backend
from cmt_aqr.attention.lowrank import ENERGY

Design = Literal["bias", "v1", "v2"]
DESIGNS = get_args(Design)


def neutral_weight(design: Design) -> float:
    """The weight with which a design changes nothing: 0 is no bias, 1 is a factor of 1."""
    return 0.0 if design == "bias" else 1.0


class AQR(nn.Module):
    """What a detector with AQR has beyond one without.

    Args:
        design: ``bias``: weights become a bias in the cross-attention; ``v1``, ``v2``: they modulate token features
            (``modulation.py``).
        generator: of the weights.
        windows: size and kind of the windows.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        bev_cell_size: metres along x, y of a BEV cell; the grid begins at x_min, y_min.
        scale: factor between weights and bias; for the design ``bias`` only, which needs it.
        max_bias: the bias is clamped to +-this; None: not clamped.
        backend: evaluator of the attention with the bias; ``lowrank`` is not for training, its bias has no gradient.
        lowrank_energy: of ``lowrank``, how much of the bias it keeps.

    Raises:
        ValueError: the design ``bias`` without a scale, or another design with one.
    """

    def __init__(
        self,
        *,
        design: Design,
        generator: WeightGenerator,
        windows: WindowSettings,
        point_range: Sequence[float],
        bev_cell_size: tuple[float, float],
        scale: Scale | None = None,
        max_bias: float | None = None,
        backend: Backend = "auto",
        lowrank_energy: float = ENERGY,
    ) -> None:
        super().__init__()
        if design not in DESIGNS:
            raise ValueError(f"the design of AQR must be one of {', '.join(DESIGNS)}, got {design!r}")
        if (scale is not None) != (design == "bias"):
            raise ValueError(
                f"AQR of the design 'bias' needs a scale and no other has one; got design {design!r} "
                f"{'without' if scale is None else 'with'} a scale"
            )
        self.design = design
        self.settings = windows
        self.point_range = tuple(point_range)
        self.bev_cell_size = tuple(bev_cell_size)
        self.max_bias = max_bias
        self.backend = backend
        self.lowrank_energy = lowrank_energy
        self.generator = generator
        self.scale = scale

    def first_query(self, num_dn: int) -> int:
        """First row of the query axis that gets weights.

        With the bias, denoising rows are queries like all others. They must not draw into a map: they stand where the
        ground truth is, and the matching queries would read it there.
        """
        return 0 if self.design == "bias" else num_dn

    def windows(
        self, reference_points: Tensor, lidar2img: Tensor, layout: TokenLayout, image_size: tuple[int, int]
    ) -> QueryWindows:
        """Windows of reference points (B, Q, 3); lidar2img (B, V, 4, 4) float64, image_size height, width in pixels."""
        return query_windows(
            reference_points,
            lidar2img,
            layout=layout,
            point_range=self.point_range,
            image_size=image_size,
            bev_cell_size=self.bev_cell_size,
            settings=self.settings,
        )

    def wants_padding(self, device: torch.device) -> bool:
        """Whether the attention is faster with zeros behind the tokens, up to whole blocks."""
        return self.design == "bias" and choose_backend(self.backend, device) == "flex"

    def bias(self, windows: QueryWindows, weights: Tensor) -> AttentionBias:
        """clamp(scale * weights, -max_bias, max_bias) in the windows; weights (B, Q, 2)."""
        return AttentionBias(windows, bias_strength(weights, self.scale(), self.max_bias))

    def attend(self, bias: AttentionBias) -> Attend:
        """The attention with this bias: q, k, v -> out, lse, for all decoder layers."""
        return make_attend(bias, backend=self.backend, energy=self.lowrank_energy)

    def modulate(self, values: Tensor, windows: QueryWindows, weights: Tensor) -> Tensor:
        """Token features (B, K, C), modulated by the map of the weights (B, Q, 2)."""
        return modulate(values, render_map(windows, weights), self.design)

    def describe(self, device: torch.device) -> str:
        """One sentence for the log; with the bias, the evaluator that the backend means on this device."""
        if self.design != "bias":
            return f"AQR {self.design}: weights modulate the token features"
        chosen = choose_backend(self.backend, device)
        said = f"{chosen} (picked by auto)" if self.backend == "auto" else chosen
        return f"AQR bias in the cross-attention, computed by {said}"

    def figures(self, weights: Tensor) -> dict[str, Tensor]:
        """Numbers for the log, 0-dim: mean |weight| of both sensors over the weights (B, Q, 2), and the scale.

        ``weights`` are those of the matching queries (``Predictions.aqr_weights``): what padding rows get says nothing.
        """
        lidar, camera = weights.abs().mean(dim=(0, 1))
        figures = {"aqr_weight_lidar": lidar, "aqr_weight_camera": camera}
        if self.scale is not None:
            figures["aqr_scale"] = self.scale().detach()[0]
        return figures
