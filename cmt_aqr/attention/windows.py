"""Windows: the cells around a query's reference point in which its bias acts.

A reference point has one window on the ground (a square of BEV cells) and one in a camera (a square of camera cells),
or one in every camera that sees it. Windows are clipped at the borders of their grid and never reach into another view.

Shape letters: B batch, V views, Q queries, N camera windows of a query (1, or V), T tokens of a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmt_aqr.attention.layout import TokenLayout

# Depths below are taken for it before the perspective division (Quirk Q11); metres.
MIN_DEPTH = 1e-5


@dataclass(frozen=True)
class WindowSettings:
    """Size and place of the windows.

    Attributes:
        bev, camera: window size in cells; a window reaches size // 2 cells to every side, so 5 is 5 x 5 and 8 is 9 x 9.
        camera_assignment: ``first``: the first camera, in the fixed order, that sees the point; ``all``: every one.
        unseen: ``none``: a point that no camera sees has no camera window; ``corner``: it has one at view 0, row 0,
            column 0, as in the original (Quirk Q11), for comparisons only.
        is_local: False: the bias acts on all tokens of the modality and the sizes do not matter.

    Raises:
        ValueError: a size is not a positive whole number, or a choice is unknown.
    """

    bev: int = 5
    camera: int = 8
    camera_assignment: Literal["first", "all"] = "first"
    unseen: Literal["none", "corner"] = "none"
    is_local: bool = True

    def __post_init__(self) -> None:
        for name in ("bev", "camera"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"the {name} window must be a positive whole number of cells, got {size!r}")
        for name, choices in (("camera_assignment", ("first", "all")), ("unseen", ("none", "corner"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def bev_radius(self) -> int:
        """Cells that a BEV window reaches to every side."""
        return self.bev // 2

    @property
    def camera_radius(self) -> int:
        """Cells that a camera window reaches to every side."""
        return self.camera // 2


@dataclass(frozen=True)
class QueryWindows:
    """The windows of all queries.

    Attributes:
        layout: the token grids that the cells belong to.
        settings: size and kind of the windows.
        bev_cells: (B, Q, 1, 3) int64 view 0, row, col of the centre cell; view -1: no window. None without BEV tokens.
        camera_cells: (B, Q, N, 3) int64 view, row, col of the centre cell; view -1: no window. None without cameras.
    """

    layout: TokenLayout
    settings: WindowSettings
    bev_cells: Tensor | None
    camera_cells: Tensor | None

    @property
    def batch_and_queries(self) -> tuple[int, int]:
        """B and Q."""
        cells = self.camera_cells if self.bev_cells is None else self.bev_cells
        return cells.shape[0], cells.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the cells are."""
        return (self.camera_cells if self.bev_cells is None else self.bev_cells).device


def query_windows(
    reference_points: Tensor,
    lidar2img: Tensor | None,
    *,
    layout: TokenLayout,
    point_range: Sequence[float],
    image_size: tuple[int, int] | None,
    bev_cell_size: tuple[float, float] | None = None,
    settings: WindowSettings | None = None,
) -> QueryWindows:
    """Find the windows of reference points.

    Everything is computed in float64, so that every device and dtype gives the same cells.

    Args:
        reference_points: (B, Q, 3) in [0, 1] of the point range; gradients do not pass.
        lidar2img: (B, V, 4, 4) LiDAR frame -> pixels of the network's input; None without camera tokens.
        layout: token grids.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
        image_size: height, width of the network's input in pixels; None without camera tokens.
        bev_cell_size: metres along x, y of a BEV cell, voxel size times stride; cell (0, 0) begins at x_min, y_min of
            the point range. The grid may be smaller than the range. None without BEV tokens.
        settings: window sizes; None: the defaults.

    Raises:
        ValueError: shapes that do not fit each other or the layout; an empty point range; a BEV cell without a size;
            calibration that is not finite (looked at on the CPU only: a GPU would have to wait. There such a view sees
            nothing).

    *Source*: MoME's `AQR_with_LAM`; *Quirks Q11, Q12*: a point exactly on the far border belongs to the last cell.
    """
    if reference_points.ndim != 3 or reference_points.shape[-1] != 3:
        raise ValueError(f"reference_points must have shape (B, Q, 3), got {tuple(reference_points.shape)}")
    if len(point_range) != 6 or any(low >= high for low, high in zip(point_range[:3], point_range[3:], strict=True)):
        raise ValueError(f"point_range must be x, y, z from and x, y, z to in metres, got {tuple(point_range)}")
    settings = settings or WindowSettings()
    sizes = [high - low for low, high in zip(point_range[:3], point_range[3:], strict=True)]
    # Metres from the range's minimum: adding the minimum first would round points off a cell's border.
    unit = reference_points.detach().double().unbind(-1)
    offsets = torch.stack([u * size for u, size in zip(unit, sizes, strict=True)], dim=-1)
    bev_cells = camera_cells = None
    if layout.num_bev:
        bev_cells = bev_cells_of(offsets[..., :2], bev_cell_size, layout)
    if layout.num_pv:
        _check_cameras(lidar2img, image_size, reference_points.shape[0], layout)
        points = torch.stack([x + low for x, low in zip(offsets.unbind(-1), point_range[:3], strict=True)], dim=-1)
        cells, is_seen = camera_cells_of(points, lidar2img.double(), image_size, layout)
        camera_cells = assign_cameras(cells, is_seen, settings)
    return QueryWindows(layout, settings, bev_cells, camera_cells)


def bev_cells_of(offsets: Tensor, cell_size: tuple[float, float] | None, layout: TokenLayout) -> Tensor:
    """The BEV cells in which points lie.

    Cells are metric, floor(offset / cell size), because that is where the features of a point are: a sparse grid may
    cover less than the point range (*Quirk Q13*). A point exactly on the grid's far border belongs to the last cell
    (*Quirk Q12*); one beyond the grid has none.

    Args:
        offsets: (B, Q, 2) x, y in metres from the grid's corner.
        cell_size: metres along x, y.
        layout: token grids.

    Returns:
        (B, Q, 1, 3) int64 view, row, col; 0, row <- y, col <- x inside the grid, -1, 0, 0 beyond it.
    """
    if cell_size is None or len(cell_size) != 2 or not all(0 < size < math.inf for size in cell_size):
        raise ValueError(f"bev_cell_size must be the metres of a BEV cell along x and y, got {cell_size}")
    num_cells = (layout.bev_cols, layout.bev_rows)
    axes = [x / size for x, size in zip(offsets.unbind(-1), cell_size, strict=True)]
    is_inside = torch.stack([(x >= 0) & (x <= num) for x, num in zip(axes, num_cells, strict=True)]).all(dim=0)
    # Beyond the grid a coordinate may be anything, also too large for an integer.
    axes = [torch.where(is_inside, x, 0).floor().to(torch.int64) for x in axes]
    col, row = (x.clamp(max=num - 1) for x, num in zip(axes, num_cells, strict=True))
    return torch.stack((torch.where(is_inside, 0, -1), row, col), dim=-1)[:, :, None]


def cells_of(unit: Tensor, num_cells: int) -> Tensor:
    """Unit coordinate -> cell by floor, clamped to [0, num_cells - 1]; int64, same shape."""
    return torch.floor(unit * num_cells).to(torch.int64).clamp(0, num_cells - 1)


def camera_cells_of(
    points: Tensor, lidar2img: Tensor, image_size: tuple[int, int], layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Project points into every view.

    Args:
        points: (B, Q, 3) metres, LiDAR frame.
        lidar2img: (B, V, 4, 4).
        image_size: height, width in pixels.
        layout: camera grids.

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
    row = cells_of(torch.where(is_seen, v / height, 0), layout.pv_rows)
    col = cells_of(torch.where(is_seen, u / width, 0), layout.pv_cols)
    return torch.stack((row, col), dim=-1), is_seen


def assign_cameras(cells: Tensor, is_seen: Tensor, settings: WindowSettings) -> Tensor:
    """Choose the views in which a query has a window.

    Args:
        cells: (B, Q, V, 2) row, col.
        is_seen: (B, Q, V) bool.
        settings: ``camera_assignment`` and ``unseen``.

    Returns:
        (B, Q, N, 3) int64 view, row, col; view -1 where there is no window, and row and col 0 with it.
    """
    view = torch.arange(cells.shape[2], device=cells.device).expand(is_seen.shape)
    if settings.camera_assignment == "first":
        view = torch.where(is_seen, view, cells.shape[2] - 1).amin(dim=-1, keepdim=True)
    chosen = cells.gather(2, view[..., None].expand(*view.shape, 2))
    has_window = is_seen.gather(2, view)
    chosen = torch.where(has_window[..., None], chosen, 0)
    windows = torch.cat((torch.where(has_window, view, -1)[..., None], chosen), dim=-1)
    if settings.unseen == "corner":
        is_unseen = ~is_seen.any(dim=-1)
        first = torch.where(is_unseen[..., None], torch.zeros_like(windows[:, :, 0]), windows[:, :, 0])
        windows = torch.cat((first[:, :, None], windows[:, :, 1:]), dim=2)
    return windows


def bev_window_tokens(windows: QueryWindows) -> tuple[Tensor, Tensor]:
    """Token indices of the BEV windows.

    Returns:
        tokens (B, Q, T) int64 index on the token axis, T = (2 radius + 1)^2, 0 where not valid; is_valid (B, Q, T)
        bool: the cell lies inside the grid.
    """
    layout, radius = windows.layout, windows.settings.bev_radius
    view = windows.bev_cells[..., :1]
    row, col = _neighbours(windows.bev_cells[..., 1:], radius)
    is_valid = (view >= 0) & (row >= 0) & (row < layout.bev_rows) & (col >= 0) & (col < layout.bev_cols)
    return torch.where(is_valid, layout.bev_index(row, col), 0).flatten(2), is_valid.flatten(2)


def camera_window_tokens(windows: QueryWindows) -> tuple[Tensor, Tensor]:
    """Token indices of the camera windows, all N of a query side by side; as :func:`bev_window_tokens`."""
    layout, radius = windows.layout, windows.settings.camera_radius
    view = windows.camera_cells[..., :1]
    row, col = _neighbours(windows.camera_cells[..., 1:], radius)
    is_valid = (view >= 0) & (row >= 0) & (row < layout.pv_rows) & (col >= 0) & (col < layout.pv_cols)
    tokens = torch.where(is_valid, layout.pv_index(view, row, col), 0)
    return tokens.flatten(2), is_valid.flatten(2)


def _neighbours(cells: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Rows and cols (..., T) of the square around cells (..., 2), row-major."""
    steps = torch.arange(-radius, radius + 1, device=cells.device)
    row, col = cells[..., None, None].unbind(-3)
    row, col = torch.broadcast_tensors(row + steps[:, None], col + steps)
    return row.flatten(-2), col.flatten(-2)


def _check_cameras(
    lidar2img: Tensor | None, image_size: tuple[int, int] | None, batch_size: int, layout: TokenLayout
) -> None:
    if lidar2img is None or lidar2img.shape != (batch_size, layout.num_views, 4, 4):
        got = "None" if lidar2img is None else tuple(lidar2img.shape)
        raise ValueError(f"lidar2img must have shape {(batch_size, layout.num_views, 4, 4)} for this layout, got {got}")
    if image_size is None or min(image_size) < 1:
        raise ValueError(f"image_size must be the height and width in pixels, got {image_size}")
    height, width = image_size
    if height * layout.pv_cols != width * layout.pv_rows:
        raise ValueError(
            f"camera grids of {layout.pv_rows} x {layout.pv_cols} cells do not fit images of {height} x {width} "
            f"pixels: a cell must be square"
        )
    if lidar2img.device.type == "cpu" and not torch.compiler.is_compiling() and not lidar2img.isfinite().all():
        raise ValueError("lidar2img holds values that are not finite")
