"""Windows: the cells around a query's reference point in which its bias acts.

A reference point has one window in a BEV grid and one in a camera, or one in every camera that sees it. Windows are
clipped at the borders of their grid and never reach into another view.

Shape letters: B batch, V views, Q queries, N windows of a query in one grid (1, or V), T tokens of a query's windows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .grids import Grid, TokenLayout

# Lower limit of the depth before the perspective division (Quirk Q11); metres.
MIN_DEPTH = 1e-5
NO_WINDOW = -1


@dataclass(frozen=True)
class WindowSettings:
    """Size of the windows, and which queries have one.

    Attributes:
        sizes: name of a grid -> window size in cells; the radius is size // 2, so 5 is 5 x 5 and 8 is 9 x 9.
        camera_assignment: ``first``: the first camera, in the fixed order, that sees the point; ``all``: every one.
        unseen: ``none``: a point that no camera sees has no camera window; ``corner``: it has one at view 0, row 0,
            column 0, as in the original (Quirk Q11), for comparisons only.
        is_local: False: the bias acts on all tokens of a grid and the sizes do not matter.

    Raises:
        ValueError: a size is not a positive whole number, or a choice is unknown.
    """

    sizes: Mapping[str, int]
    camera_assignment: Literal["first", "all"] = "first"
    unseen: Literal["none", "corner"] = "none"
    is_local: bool = True

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"the {name} window must be a positive whole number of cells, got {size!r}")
        for name, choices in (("camera_assignment", ("first", "all")), ("unseen", ("none", "corner"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def radius(self, grid: Grid) -> int:
        """Radius of a window in this grid, in cells."""
        return self.sizes[grid.name] // 2


@dataclass(frozen=True)
class QueryWindows:
    """The windows of all queries.

    Attributes:
        layout: the token grids that the cells belong to.
        settings: size and kind of the windows.
        cells: for every grid (B, Q, N, 3) int64 view, row, col of the centre cell; view ``NO_WINDOW``: there is none.
    """

    layout: TokenLayout
    settings: WindowSettings
    cells: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        names = [grid.name for grid in self.layout.grids]
        if len(self.cells) != len(names) or not set(names) <= set(self.settings.sizes):
            raise ValueError(
                f"grids {names} need a tensor of cells and a window size each, got {len(self.cells)} tensors and sizes "
                f"for {list(self.settings.sizes)}"
            )

    @property
    def batch_and_queries(self) -> tuple[int, int]:
        """B and Q."""
        return self.cells[0].shape[0], self.cells[0].shape[1]

    @property
    def most_per_grid(self) -> int:
        """The largest N of all grids."""
        return max(cells.shape[2] for cells in self.cells)


def in_window(rows_away: Tensor, cols_away: Tensor, radius: int | Tensor) -> Tensor:
    """The shape of a window, a square: whether a cell so many rows and columns away from the centre is inside."""
    return (rows_away.abs() <= radius) & (cols_away.abs() <= radius)


def query_windows(
    reference_points: Tensor,
    lidar2img: Tensor | None,
    *,
    layout: TokenLayout,
    point_range: Sequence[float],
    image_size: tuple[int, int] | None,
    settings: WindowSettings,
) -> QueryWindows:
    """Find the windows of reference points.

    Everything is computed in float64, so that every device and dtype gives the same cells.

    Args:
        reference_points: (B, Q, 3) in [0, 1] of the point range; gradients do not pass.
        lidar2img: (B, V, 4, 4) LiDAR frame -> pixels of the network's input; None without camera tokens.
        layout: token grids.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        image_size: height, width of the network's input in pixels; None without camera tokens.
        settings: window sizes.

    Raises:
        ValueError: shapes that do not fit each other or the layout; an empty point range; calibration that is not
            finite (checked on the CPU only: a GPU would have to wait. There such a view sees nothing).

    *Source*: MoME's `AQR_with_LAM`; *Quirks Q11, Q12*: a point exactly on the far border belongs to the last cell.
    """
    if reference_points.ndim != 3 or reference_points.shape[-1] != 3:
        raise ValueError(f"reference_points must have shape (B, Q, 3), got {tuple(reference_points.shape)}")
    if len(point_range) != 6 or any(low >= high for low, high in zip(point_range[:3], point_range[3:], strict=True)):
        raise ValueError(f"point_range must be x, y, z from and x, y, z to in metres, got {tuple(point_range)}")
    # Metres from the range's minimum: adding the minimum before a division by the cell size would round points off a
    # cell's border.
    unit = reference_points.detach().double()
    offsets = [unit[..., i] * (point_range[i + 3] - point_range[i]) for i in range(3)]
    cells = []
    for grid in layout.grids:
        if grid.cell_size is not None:
            cells.append(bev_cells(*(offsets[i] + (point_range[i] - grid.origin[i]) for i in range(2)), grid))
        else:
            _check_cameras(lidar2img, image_size, reference_points.shape[0], grid)
            points = torch.stack([offsets[i] + point_range[i] for i in range(3)], dim=-1)
            found, is_seen = camera_cells(points, lidar2img.double(), image_size, grid)
            cells.append(assign_cameras(found, is_seen, settings))
    return QueryWindows(layout, settings, tuple(cells))


def bev_cells(x: Tensor, y: Tensor, grid: Grid) -> Tensor:
    """The BEV cells in which points lie.

    Cells are metric, floor(offset / cell size), because that is where the features of a point are: a sparse grid may
    cover less than the point range (*Quirk Q13*). A point exactly on the grid's far border belongs to the last cell
    (*Quirk Q12*); one beyond the grid has no window.

    Args:
        x, y: (B, Q) metres from the grid's origin.
        grid: a BEV grid.

    Returns:
        (B, Q, 1, 3) int64 view, row, col; 0, row <- y, col <- x inside the grid, NO_WINDOW, 0, 0 beyond it.
    """
    x, y = x / grid.cell_size[0], y / grid.cell_size[1]
    is_on_grid = (x >= 0) & (x <= grid.cols) & (y >= 0) & (y <= grid.rows)
    # Beyond the grid a coordinate may be anything, also too large for an integer.
    col, row = (torch.where(is_on_grid, axis, 0).floor().to(torch.int64) for axis in (x, y))
    col, row = col.clamp(max=grid.cols - 1), row.clamp(max=grid.rows - 1)
    return torch.stack((torch.where(is_on_grid, 0, NO_WINDOW), row, col), dim=-1)[:, :, None]


def cells_of(unit: Tensor, num_cells: int) -> Tensor:
    """Unit coordinate -> cell by floor, clamped to [0, num_cells - 1]; int64, same shape."""
    return torch.floor(unit * num_cells).to(torch.int64).clamp(0, num_cells - 1)


def camera_cells(points: Tensor, lidar2img: Tensor, image_size: tuple[int, int], grid: Grid) -> tuple[Tensor, Tensor]:
    """Project points (B, Q, 3), metres in the LiDAR frame, into every view by lidar2img (B, V, 4, 4).

    Returns:
        cells (B, Q, V, 2) int64 row, col, meaningful where seen; is_seen (B, Q, V) bool: in front of the camera and
        0 <= u < width, 0 <= v < height.
    """
    camera = points[:, None] @ lidar2img[..., :3, :3].transpose(-1, -2) + lidar2img[..., None, :3, 3]
    camera = camera.transpose(1, 2)  # (B, Q, V, 3): u d, v d, d
    depth = camera[..., 2]
    pixels = camera[..., :2] / depth.clamp(min=MIN_DEPTH)[..., None]
    u, v = pixels.unbind(-1)
    height, width = image_size
    is_seen = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    is_seen = is_seen & lidar2img.isfinite().all(dim=-1).all(dim=-1)[:, None]
    # Where a point is not seen its pixel may be anything, also too large for an integer.
    row = cells_of(torch.where(is_seen, v / height, 0), grid.rows)
    col = cells_of(torch.where(is_seen, u / width, 0), grid.cols)
    return torch.stack((row, col), dim=-1), is_seen


def assign_cameras(cells: Tensor, is_seen: Tensor, settings: WindowSettings) -> Tensor:
    """Choose the views in which a query has a window, from cells (B, Q, V, 2) row, col and is_seen (B, Q, V).

    Returns:
        (B, Q, N, 3) int64 view, row, col; NO_WINDOW, 0, 0 where there is none.
    """
    view = torch.arange(cells.shape[2], device=cells.device).expand(is_seen.shape)
    if settings.camera_assignment == "first":
        view = torch.where(is_seen, view, cells.shape[2] - 1).amin(dim=-1, keepdim=True)
    chosen = cells.gather(2, view[..., None].expand(*view.shape, 2))
    has_window = is_seen.gather(2, view)
    chosen = torch.where(has_window[..., None], chosen, 0)
    windows = torch.cat((torch.where(has_window, view, NO_WINDOW)[..., None], chosen), dim=-1)
    if settings.unseen == "corner":
        is_unseen = ~is_seen.any(dim=-1)
        first = torch.where(is_unseen[..., None], torch.zeros_like(windows[:, :, 0]), windows[:, :, 0])
        windows = torch.cat((first[:, :, None], windows[:, :, 1:]), dim=2)
    return windows


def _check_cameras(lidar2img: Tensor | None, image_size: tuple[int, int] | None, batch_size: int, grid: Grid) -> None:
    expected = (batch_size, grid.views, 4, 4)
    if lidar2img is None or lidar2img.shape != expected:
        got = "None" if lidar2img is None else tuple(lidar2img.shape)
        raise ValueError(f"lidar2img must have shape {expected} for the grid {grid.name!r}, got {got}")
    if image_size is None or min(image_size) < 1:
        raise ValueError(f"image_size must be the height and width in pixels, got {image_size}")
    height, width = image_size
    if height * grid.cols != width * grid.rows:
        raise ValueError(
            f"camera grids of {grid.rows} x {grid.cols} cells do not fit images of {height} x {width} pixels: a cell "
            f"must be square"
        )
    if lidar2img.device.type == "cpu" and not torch.compiler.is_compiling() and not lidar2img.isfinite().all():
        raise ValueError("lidar2img holds values that are not finite")
