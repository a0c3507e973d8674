"""Queries: learned reference points, and their position embeddings, from the BEV plane and from camera rays.

Shape letters: B batch, V views, Q queries (denoising rows first), C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmt_aqr.cameras import Cameras
from cmt_aqr.geometry import DEPTH_EPS, inverse_sigmoid, project, to_metres
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.precision import at_least_float32
from cmt_aqr.predictions import DenoisingQueries


class ReferencePoints(nn.Module):
    """Learned reference points, uniform in [0, 1] at the start.

    Args:
        num_queries: number of matching queries.
    """

    def __init__(self, *, num_queries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_queries, 3))

    @property
    def num_queries(self) -> int:
        """Number of matching queries."""
        return self.weight.shape[0]

    def forward(self, batch_size: int, denoising: DenoisingQueries | None = None) -> Tensor:
        """Reference points (B, Q, 3), unit cube: denoising rows first, then the learned points."""
        learned = self.weight.expand(batch_size, -1, -1)
        if denoising is None:
            return learned
        if denoising.reference_points.shape[0] != batch_size:
            raise ValueError(
                f"denoising queries are for {denoising.reference_points.shape[0]} samples, the batch has {batch_size}"
            )
        return torch.cat((denoising.reference_points.to(learned.dtype), learned), dim=1)


def project_to_pixels(
    reference_points: Tensor, cameras: Cameras, point_range: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Project reference points into every view for the ray embedding.

    (u d, v d, d) is divided by the *detached* depth moved away from zero by 1e-6, so the third component is 1 up to
    rounding but carries the gradient of the depth (*Quirk Q6*).

    Args:
        reference_points: (B, Q, 3) in [0, 1].
        cameras: calibration of the batch.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.

    Returns:
        pixels (B, V, Q, 3) homogeneous; is_seen (B, V, Q) bool: depth > 0, 0 <= u < width, 0 <= v < height.

    *Source*: original `CmtHead._rv_query_embed`.
    """
    scaled, depth = project(to_metres(reference_points, point_range), cameras.lidar2img.to(reference_points.dtype))
    in_front = depth.detach() > 0
    divisor = depth.detach() + torch.where(in_front, DEPTH_EPS, -DEPTH_EPS).to(depth.dtype)
    pixels = torch.cat((scaled, depth[..., None]), dim=-1) / divisor[..., None]
    u, v = pixels[..., 0], pixels[..., 1]
    height, width = cameras.image_size
    return pixels, in_front & (u >= 0) & (u < width) & (v >= 0) & (v < height)


def ray_query_positions(embedding: RayEmbedding, reference_points: Tensor, cameras: Cameras) -> Tensor:
    """Ray embeddings (B, Q, C) of the queries, summed over the views that see them; 0 where none does."""
    pixels, is_seen = project_to_pixels(reference_points, cameras, embedding.point_range)
    return (embedding(pixels, cameras.img2lidar) * is_seen[..., None]).sum(1)


def embedded_points(reference_points: Tensor) -> Tensor:
    """The points that are embedded: inverse sigmoid and sigmoid clamp them to about [1e-5, 1 - 1e-5] (*Quirk Q6*)."""
    return inverse_sigmoid(reference_points).sigmoid()


def query_positions(
    bev_embedding: BevEmbedding, ray_embedding: RayEmbedding | None, reference_points: Tensor, cameras: Cameras | None
) -> Tensor:
    """Position embeddings (B, Q, C): ground embedding plus, in a model with cameras, the ray embedding.

    All of it is computed in at least float32, also under autocast.
    """
    points = at_least_float32(reference_points)
    with torch.autocast(points.device.type, enabled=False):
        points = embedded_points(points)
        positions = bev_embedding(points[..., :2])
        if ray_embedding is None or cameras is None:
            return positions
        return positions + ray_query_positions(ray_embedding, points, cameras)
