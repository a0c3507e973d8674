"""Where tokens are: sine embedding of BEV cells, camera rays of pixels, and the two MLPs that embed them.

Shape letters: B batch, V views, K tokens, C channels, N depth bins of a ray.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmt_aqr.cameras import Cameras
from cmt_aqr.geometry import to_unit
from cmt_aqr.precision import at_least_float32

# First depth of a camera ray in metres; the last bin ends at x_max of the point range (Quirk Q5).
FIRST_DEPTH = 1.0
# Width of the ray MLP's hidden layer in multiples of C.
RAY_MLP_RATIO = 4


def sine_embedding(xy: Tensor, num_features: int) -> Tensor:
    """Sine embedding of unit coordinates.

    Feature i of a coordinate p is sin (i even) or cos (i odd) of 2 pi p / (1 + 2 floor(i / 2) / num_features).

    Args:
        xy: (..., 2) in [0, 1], x first.
        num_features: features per coordinate, even.

    Returns:
        (..., 2 * num_features): the y half first, then the x half.

    *Source*: original `pos2embed`. *Quirk Q3*: the divisor is linear in i, not a power of a temperature.
    """
    if num_features % 2:
        raise ValueError(f"sine_embedding needs an even number of features per coordinate, got {num_features}")
    pair = torch.arange(num_features // 2, dtype=xy.dtype, device=xy.device)
    divisor = 1 + 2 * pair / num_features
    angle = 2 * math.pi * xy.flip(-1)[..., None] / divisor
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)


def bev_cell_centres(rows: int, cols: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres of the BEV cells in unit coordinates.

    The grid always fills the unit square, whatever its metric size. For the 0.1 m preset, whose 128 cells of 0.8 m
    cover 102.4 m of a 108 m range, cells are therefore stretched by 1080 / 1024 against metric coordinates; its weights
    need that (*Quirk Q13*).

    Returns:
        (rows * cols, 2): ((col + 0.5) / cols, (row + 0.5) / rows), row-major. *Quirk Q4*: cell centres.

    *Source*: original `CmtHead.coords_bev`, which is the same on square grids and swaps the axes on others.
    """
    y = (torch.arange(rows, dtype=dtype, device=device) + 0.5) / rows
    x = (torch.arange(cols, dtype=dtype, device=device) + 0.5) / cols
    return torch.stack((x.expand(rows, cols), y[:, None].expand(rows, cols)), dim=-1).flatten(0, 1)


def ray_depths(num_depths: int, max_depth: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Depths (N,) along a camera ray in metres: 1 + i * (max_depth - 1) / N, i = 0 .. N - 1. *Quirk Q5*."""
    steps = torch.arange(num_depths, dtype=dtype, device=device)
    return FIRST_DEPTH + steps * (max_depth - FIRST_DEPTH) / num_depths


def pixel_corners(rows: int, cols: int, image_size: tuple[int, int], *, like: Tensor) -> Tensor:
    """Homogeneous pixels of the feature cells' upper left corners.

    Returns:
        (rows * cols, 3): (col * width / cols, row * height / rows, 1) in pixels, row-major, dtype and device of
        ``like``. *Quirk Q4*: corners, not centres.
    """
    v = torch.arange(rows, dtype=like.dtype, device=like.device) * image_size[0] / rows
    u = torch.arange(cols, dtype=like.dtype, device=like.device) * image_size[1] / cols
    pixels = torch.stack((u.expand(rows, cols), v[:, None].expand(rows, cols)), dim=-1).flatten(0, 1)
    return torch.cat((pixels, torch.ones_like(pixels[:, :1])), dim=-1)


def camera_rays(pixels: Tensor, img2lidar: Tensor, depths: Tensor, point_range: Sequence[float]) -> Tensor:
    """Points along the rays through pixels: img2lidar @ (u d, v d, w d, 1) for every depth d, in unit coordinates.

    Args:
        pixels: (..., P, 3) homogeneous pixels (u, v, w), w = 1 up to rounding; leading dimensions broadcast.
        img2lidar: (B, V, 4, 4).
        depths: (N,) metres.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.

    Returns:
        (B, V, P, 3 N), depth-major: (x, y, z) of depth 0, then of depth 1, ...; 0 and 1 are the borders of the point
        range, and values beyond them are kept.

    *Source*: original `CmtHead._rv_pe` and `_rv_query_embed`.
    """
    directions = pixels @ img2lidar[..., :3, :3].transpose(-1, -2)
    points = directions[..., None, :] * depths[:, None] + img2lidar[..., None, None, :3, 3]
    return to_unit(points, point_range).flatten(-2)


class BevEmbedding(nn.Module):
    """Position of BEV cells and of queries on the ground: sine embedding (Q3), then a two-layer MLP.

    Args:
        dim: C.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, xy: Tensor) -> Tensor:
        """Unit coordinates (..., 2), x first -> (..., C), at least float32 also under autocast."""
        xy = at_least_float32(xy)
        with torch.autocast(xy.device.type, enabled=False):
            return self.mlp(sine_embedding(xy, self.dim))


class RayEmbedding(nn.Module):
    """Position of camera cells and of queries seen by a camera: points along the ray, then a two-layer MLP.

    Args:
        dim: C.
        num_depths: N, depth bins of a ray.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
    """

    def __init__(self, *, dim: int, num_depths: int, point_range: Sequence[float]) -> None:
        super().__init__()
        self.num_depths = num_depths
        self.point_range = tuple(point_range)
        hidden = RAY_MLP_RATIO * dim
        self.mlp = nn.Sequential(nn.Linear(3 * num_depths, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, pixels: Tensor, img2lidar: Tensor) -> Tensor:
        """Embed the rays through pixels.

        Args:
            pixels: (..., P, 3) homogeneous pixels, leading dimensions broadcast with (B, V).
            img2lidar: (B, V, 4, 4), same dtype.

        Returns:
            (B, V, P, C), at least float32 also under autocast.
        """
        pixels, img2lidar = at_least_float32(pixels), at_least_float32(img2lidar)
        depths = ray_depths(self.num_depths, self.point_range[3], dtype=pixels.dtype, device=pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.mlp(camera_rays(pixels, img2lidar, depths, self.point_range))


def bev_positions(embedding: BevEmbedding, rows: int, cols: int, *, like: Tensor) -> Tensor:
    """Position embeddings (1, rows * cols, C) of a BEV grid, in token order; the same for every sample."""
    return embedding(bev_cell_centres(rows, cols, dtype=like.dtype, device=like.device))[None]


def pv_positions(embedding: RayEmbedding, rows: int, cols: int, cameras: Cameras) -> Tensor:
    """Position embeddings (B, V * rows * cols, C) of the camera grids, in token order (view, row, col)."""
    pixels = pixel_corners(rows, cols, cameras.image_size, like=cameras.img2lidar)
    return embedding(pixels, cameras.img2lidar).flatten(1, 2)
