"""Token grids: how the token axis is laid out, and token index <-> (grid, view, row, col).

The grids follow each other in the order of the layout; inside one, the index is
``start + (view * rows + row) * cols + col``. In a BEV grid, which has one view, rows run along y and columns along x.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The kernel of flex/ needs no checks at the end of the token axis when its length is a multiple of this.
PADDED_MULTIPLE = 128


@dataclass(frozen=True)
class Grid:
    """The tokens of one sensor: feature maps of one size.

    Attributes:
        name: of the sensor, such as ``lidar``.
        views: number of maps: the cameras, or 1 for a BEV grid.
        rows, cols: cells of a map.
        origin: metres x, y of the corner where cell (0, 0) of a BEV grid begins; None for cameras.
        cell_size: metres along x, y of a BEV cell (voxel size times stride); None for cameras: cells divide the image.
    """

    name: str
    views: int
    rows: int
    cols: int
    origin: tuple[float, float] | None = None
    cell_size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        sizes = (self.views, self.rows, self.cols)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"views, rows, cols of the grid {self.name!r} must be whole numbers above 0, got {sizes}")
        if self.origin is None and self.cell_size is None:
            return
        pairs = self.origin is not None and self.cell_size is not None and len(self.origin) == len(self.cell_size) == 2
        if not pairs or self.views != 1 or not all(0 < size < math.inf for size in self.cell_size):
            raise ValueError(
                f"the BEV grid {self.name!r} needs one view, and the metres along x and y of its origin and of a cell; "
                f"got views {self.views}, origin {self.origin}, cell_size {self.cell_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Cells of all views."""
        return self.views * self.rows * self.cols


@dataclass(frozen=True)
class TokenLayout:
    """The grids of the token axis, in order; a sensor that is not there has no grid."""

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        names = [grid.name for grid in self.grids]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a TokenLayout needs at least one grid, each with a name of its own, got names {names}")

    @property
    def num_tokens(self) -> int:
        """K, the length of the token axis."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def padded_length(self) -> int:
        """K rounded up to whole blocks of keys."""
        return -(-self.num_tokens // PADDED_MULTIPLE) * PADDED_MULTIPLE

    def token_range(self, number: int) -> tuple[int, int]:
        """First token of a grid, and the end (exclusive)."""
        start = sum(grid.num_tokens for grid in self.grids[:number])
        return start, start + self.grids[number].num_tokens

    def index(self, number: int, view: int, row: int, col: int) -> int:
        """Token index of a cell of grid ``number``; integers or tensors."""
        grid = self.grids[number]
        return self.token_range(number)[0] + (view * grid.rows + row) * grid.cols + col

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The inverse of :meth:`index`: (4, K) int64 number of the grid, view, row and col of every token."""
        tables = []
        for number, grid in enumerate(self.grids):
            axes = [torch.arange(size, device=device) for size in (grid.views, grid.rows, grid.cols)]
            cells = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
            tables.append(torch.cat((torch.full_like(cells[:1], number), cells)))
        return torch.cat(tables, dim=1)
