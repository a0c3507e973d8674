"""TokenLayout: how the token axis is laid out (static grid sizes) and index <-> (modality, view, row, col).

Order: BEV tokens first, index ``row * W + col`` (row <- y, col <- x); then camera tokens, index
``(view * H + row) * W + col``. A LiDAR-only or camera-only model has one of the two parts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """Grid sizes of the token axis.

    Attributes:
        bev_rows, bev_cols: BEV grid, 0 x 0 when there is no LiDAR.
        num_views, pv_rows, pv_cols: camera grids, 0 when there is no camera.
    """

    bev_rows: int = 0
    bev_cols: int = 0
    num_views: int = 0
    pv_rows: int = 0
    pv_cols: int = 0

    def __post_init__(self) -> None:
        bev, cameras = (self.bev_rows, self.bev_cols), (self.num_views, self.pv_rows, self.pv_cols)
        sizes = (*bev, *cameras)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
            raise ValueError(f"grid sizes of a TokenLayout must be whole numbers, got {sizes}")
        if any(size < 0 for size in sizes):
            raise ValueError(f"grid sizes of a TokenLayout must not be negative, got {sizes}")
        if self.num_tokens == 0:
            raise ValueError("a TokenLayout needs BEV tokens, camera tokens, or both; got neither")
        for name, grid in (("BEV", bev), ("camera", cameras)):
            if min(grid) == 0 < max(grid):
                raise ValueError(f"the sizes of the {name} grid must be all 0 or none, got {grid}")

    @property
    def num_bev(self) -> int:
        """Number of BEV tokens."""
        return self.bev_rows * self.bev_cols

    @property
    def num_pv(self) -> int:
        """Number of camera tokens, all views."""
        return self.num_views * self.pv_rows * self.pv_cols

    @property
    def num_tokens(self) -> int:
        """K, the length of the token axis."""
        return self.num_bev + self.num_pv

    def bev_index(self, row: int, col: int) -> int:
        """Token index of a BEV cell."""
        return row * self.bev_cols + col

    def pv_index(self, view: int, row: int, col: int) -> int:
        """Token index of a camera cell."""
        return self.num_bev + (view * self.pv_rows + row) * self.pv_cols + col

    def cell(self, index: int) -> tuple[int, int, int]:
        """Token index -> (view, row, col); view is -1 for a BEV token."""
        if not 0 <= index < self.num_tokens:
            raise ValueError(f"token index {index} is outside [0, {self.num_tokens})")
        if index < self.num_bev:
            return (-1, *divmod(index, self.bev_cols))
        view, rest = divmod(index - self.num_bev, self.pv_rows * self.pv_cols)
        return (view, *divmod(rest, self.pv_cols))
