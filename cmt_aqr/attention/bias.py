"""The attention bias: what it is, and the test whether a token lies in a query's window.

    score[q, k] = q . k / sqrt(D) + bias[q, k]
    bias[q, k]  = clamp(scale * weight_m(q), -max_bias, max_bias)   if token k lies in q's window of modality m, else 0

The test is one subtraction and one AND of integers. All grids are laid out on one plane, BEV on top and the views below
it, with gaps that no window bridges. A coordinate on the plane is multiplied by a step chosen so that the tokens of a
window are those less than ``SPAN`` = 2^k away from its first one in both coordinates; row and column share one integer:

    token code  = (row + radius) * step << shift  |  (col + radius) * step
    window code = row * step << shift             |  col * step                 of the centre cell
    inside      = (token code - window code) & ~(SPAN - 1 in both fields) == 0

A negative difference sets high bits of its field, and a borrow sets those of the lower one, so nothing else passes.
``schedule.py`` has the form of the test that a kernel uses.

Shape letters: B batch, Q queries, N windows of a query in one modality, K tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.windows import QueryWindows, WindowSettings

LIDAR, CAMERA = 0, 1


@dataclass(frozen=True)
class AttentionBias:
    """A bias for the cross-attention of one batch, shared by all heads and layers.

    Attributes:
        windows: where it acts.
        strength: (B, Q, 2) floating point: what is added to the scores of the LiDAR window, of the camera window.
    """

    windows: QueryWindows
    strength: Tensor

    def __post_init__(self) -> None:
        expected = (*self.windows.batch_and_queries, 2)
        if tuple(self.strength.shape) != expected:
            raise ValueError(f"the strength of a bias must have shape {expected}, got {tuple(self.strength.shape)}")


def bias_strength(weights: Tensor, scale: Tensor | float, max_bias: float | None) -> Tensor:
    """clamp(scale * weights, -max_bias, max_bias); any shape; None: no clamp.

    A product exactly at a limit keeps its gradient: it has to be able to come back.
    """
    strength = scale * weights
    if max_bias is None:
        return strength
    # Not torch.clamp, whose gradient exactly at a limit is 1 up to PyTorch 2.11 and 0 in later versions.
    strength = torch.where(strength > max_bias, max_bias, strength)
    return torch.where(strength < -max_bias, -max_bias, strength)


@dataclass(frozen=True)
class CodePlane:
    """How cells become codes; see the head of this file.

    Attributes:
        span_bits: k.
        shift: bits of the column field.
        steps: for LiDAR and camera, what one cell is on the plane.
        radii: for LiDAR and camera, the reach of a window.
        first_row: for BEV and every view, where its rows begin on the plane.
        nowhere: code of a window that holds no token.
        dtype: int32, or int64 where the plane is too large for it; three bits more than codes need.
    """

    span_bits: int
    shift: int
    steps: tuple[int, int]
    radii: tuple[int, int]
    first_row: tuple[int, ...]
    nowhere: int
    dtype: torch.dtype

    @property
    def outside(self) -> int:
        """The bits of a difference that are 0 exactly inside the window; not the sign, which is never set alone."""
        span = (1 << self.span_bits) - 1
        return torch.iinfo(self.dtype).max & ~(span << self.shift | span)

    @property
    def high(self) -> int:
        """The lowest of the bits that no code has."""
        return 1 << torch.iinfo(self.dtype).bits - 3


def code_plane(layout: TokenLayout, settings: WindowSettings) -> CodePlane:
    """The plane for these grids and window sizes."""
    # A window larger than its grid is as large as the grid; without this its codes might not fit an integer.
    reaches = (max(layout.bev_rows, layout.bev_cols), max(layout.pv_rows, layout.pv_cols))
    radii = tuple(
        min(radius, max(reach - 1, 0))
        for radius, reach in zip((settings.bev_radius, settings.camera_radius), reaches, strict=True)
    )
    span_bits = next(bits for bits in range(1, 64) if all(_step(radius, bits) for radius in radii))
    span, steps = 1 << span_bits, tuple(_step(radius, span_bits) for radius in radii)
    grids = [(LIDAR, layout.bev_rows, layout.bev_cols)]
    grids += [(CAMERA, layout.pv_rows, layout.pv_cols)] * layout.num_views
    first_row, row, width = [], 0, 0
    for modality, rows, cols in grids:
        first_row.append(row)
        # A token's code is up to 2 radius cells above that of a window's centre, and windows of the next grid begin
        # a span further on.
        row += (rows + 2 * radii[modality]) * steps[modality] + span
        width = max(width, (cols + 2 * radii[modality]) * steps[modality])
    shift = (width + span).bit_length()
    nowhere = row + span << shift
    return CodePlane(
        span_bits=span_bits,
        shift=shift,
        steps=steps,
        radii=radii,
        first_row=tuple(first_row),
        nowhere=nowhere,
        dtype=torch.int32 if nowhere < 2**29 else torch.int64,
    )


def _step(radius: int, bits: int) -> int:
    """The smallest step with 2 radius * step < 2^bits <= (2 radius + 1) * step; 0 when there is none."""
    step = -(-(1 << bits) // (2 * radius + 1))
    return step if 2 * radius * step < 1 << bits else 0


def token_codes(layout: TokenLayout, plane: CodePlane, *, device: torch.device | str | None = None) -> Tensor:
    """Codes (K,) of all tokens, in token order."""
    grids = [(LIDAR, layout.bev_rows, layout.bev_cols)]
    grids += [(CAMERA, layout.pv_rows, layout.pv_cols)] * layout.num_views
    codes = []
    for (modality, rows, cols), first_row in zip(grids, plane.first_row, strict=True):
        step, radius = plane.steps[modality], plane.radii[modality]
        row = first_row + (torch.arange(rows, device=device) + radius) * step
        col = (torch.arange(cols, device=device) + radius) * step
        codes.append(((row[:, None] << plane.shift) + col).flatten())
    return torch.cat(codes).to(plane.dtype)


def window_codes(windows: QueryWindows, plane: CodePlane, modality: int) -> Tensor:
    """Codes (B, Q, N) of the windows of one modality, LIDAR or CAMERA."""
    cells = windows.bev_cells if modality == LIDAR else windows.camera_cells
    view, row, col = cells.unbind(-1)
    first_rows = plane.first_row[:1] if modality == LIDAR else plane.first_row[1:]
    # All views are of one size. Arithmetic instead of a table, for which a GPU would have to wait.
    pitch = first_rows[1] - first_rows[0] if len(first_rows) > 1 else 0
    starts = first_rows[0] + view * pitch
    step = plane.steps[modality]
    codes = (starts + row * step << plane.shift) + col * step
    return torch.where(view >= 0, codes, plane.nowhere).to(plane.dtype)


def is_inside(token_code: Tensor, window_code: Tensor, plane: CodePlane) -> Tensor:
    """Whether a token lies in a window; bool, the broadcast shape of the codes."""
    return (token_code - window_code) & plane.outside == 0
