"""Packed coordinates: the test whether a token lies in a window as one subtraction and one AND of integers.

The kernel evaluates the test for every score of a partial block, so its cost matters. All views of all grids share one
coordinate system: they are stacked along its rows, with gaps wider than any window. Coordinates are multiplied by a
step chosen so that the tokens of a window are those less than ``SPAN`` = 2^k away from its first one along both axes;
row and column are packed into one integer:

    token code  = (row + radius) * step << shift  |  (col + radius) * step
    window code = row * step << shift             |  col * step                 of the centre cell
    inside      = (token code - window code) & ~(SPAN - 1 in both fields) == 0

A negative difference sets high bits of its field, and a borrow sets those of the lower one, so nothing else passes.
``membership_codes`` has the form of the test that the kernel uses.

Shape letters: B batch, Q queries, N windows of a query in one grid, K tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..grids import TokenLayout
from ..windows import QueryWindows, WindowSettings


@dataclass(frozen=True)
class Packing:
    """How cells become packed coordinates; see the module docstring.

    Attributes:
        span_bits: k.
        shift: bits of the column field.
        steps: for every grid, the distance of neighbouring cells in packed coordinates.
        radii: for every grid, the radius of a window in cells.
        first_rows: for every grid, packed row where its first view begins.
        pitches: for every grid, packed rows from one view to the next.
        no_window: code of a window that holds no token.
        dtype: int32, or int64 where the coordinates do not fit; three bits more than codes need.
    """

    span_bits: int
    shift: int
    steps: tuple[int, ...]
    radii: tuple[int, ...]
    first_rows: tuple[int, ...]
    pitches: tuple[int, ...]
    no_window: int
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


def make_packing(layout: TokenLayout, settings: WindowSettings) -> Packing:
    """The packed coordinates of these grids and window sizes."""
    # A window larger than its grid is as large as the grid; without this its codes might not fit an integer.
    radii = tuple(min(settings.radius(grid), max(grid.rows, grid.cols) - 1) for grid in layout.grids)
    span_bits = next(bits for bits in range(1, 64) if all(_step(radius, bits) for radius in radii))
    span, steps = 1 << span_bits, tuple(_step(radius, span_bits) for radius in radii)
    first_rows, pitches, row, width = [], [], 0, 0
    for grid, step, radius in zip(layout.grids, steps, radii, strict=True):
        first_rows.append(row)
        # A token's code is up to 2 radius cells above that of a window's centre, and windows of the next view begin
        # a span further on.
        pitches.append((grid.rows + 2 * radius) * step + span)
        row += grid.views * pitches[-1]
        width = max(width, (grid.cols + 2 * radius) * step)
    shift = (width + span).bit_length()
    no_window = row + span << shift
    return Packing(
        span_bits=span_bits,
        shift=shift,
        steps=steps,
        radii=radii,
        first_rows=tuple(first_rows),
        pitches=tuple(pitches),
        no_window=no_window,
        dtype=torch.int32 if no_window < 2**29 else torch.int64,
    )


def _step(radius: int, bits: int) -> int:
    """The smallest step with 2 radius * step < 2^bits <= (2 radius + 1) * step; 0 when there is none."""
    step = -(-(1 << bits) // (2 * radius + 1))
    return step if 2 * radius * step < 1 << bits else 0


def token_codes(layout: TokenLayout, packing: Packing, *, device: torch.device | str | None = None) -> Tensor:
    """Codes (K,) of all tokens, in token order."""
    codes = []
    for number, grid in enumerate(layout.grids):
        step, radius = packing.steps[number], packing.radii[number]
        row = (torch.arange(grid.rows, device=device) + radius) * step
        col = (torch.arange(grid.cols, device=device) + radius) * step
        for view in range(grid.views):
            start = packing.first_rows[number] + view * packing.pitches[number]
            codes.append(((start + row[:, None] << packing.shift) + col).flatten())
    return torch.cat(codes).to(packing.dtype)


def window_codes(windows: QueryWindows, packing: Packing, number: int) -> Tensor:
    """Codes (B, Q, N) of the windows in grid ``number``."""
    view, row, col = windows.cells[number].unbind(-1)
    step = packing.steps[number]
    # Arithmetic instead of a table of the views, for which a GPU would have to wait.
    start = packing.first_rows[number] + view * packing.pitches[number]
    codes = (start + row * step << packing.shift) + col * step
    return torch.where(view >= 0, codes, packing.no_window).to(packing.dtype)


def is_inside(token_code: Tensor, window_code: Tensor, packing: Packing) -> Tensor:
    """Whether a token lies in a window; bool, the broadcast shape of the codes."""
    return (token_code - window_code) & packing.outside == 0


def membership_codes(
    layout: TokenLayout, packing: Packing, number: int, length: int, *, device: torch.device
) -> Tensor:
    """Codes (length,) of the tokens for a test with three answers that one comparison tells apart.

    With ``high`` an otherwise unused bit of the codes,

        x = ((code + high - window code) & outside) ^ high

    is 0 inside the window and below 2 high outside. Anything but a token of grid ``number`` has the code 3 high: x is
    then at least 2 high for every window.

    Made on the device, inside the graph: in a compiled graph a copy from the CPU may begin when its source has been
    overwritten already.
    """
    codes = nn.functional.pad(token_codes(layout, packing, device=device), (0, length - layout.num_tokens))
    token = torch.arange(length, device=device)
    start, end = layout.token_range(number)
    is_ours = (token >= start) & (token < end)
    return torch.where(is_ours, codes + packing.high, 3 * packing.high).to(packing.dtype)
