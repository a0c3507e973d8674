"""The detector: branches -> tokens -> queries -> AQR -> decoder -> heads.

Shape letters: B batch, V views, P points, H, W rows and columns of a grid, K tokens, Q queries, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmt_aqr.aqr.router import BiasRouter, ModulationRouter, Routed
from cmt_aqr.attention import Grid, QueryWindows, TokenLayout
from cmt_aqr.cameras import Cameras, make_cameras
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.position import BevEmbedding, RayEmbedding, bev_positions, pv_positions
from cmt_aqr.models.queries import ReferencePoints, query_positions
from cmt_aqr.predictions import DenoisingQueries, Predictions
from cmt_aqr.tokens import Geometry, Queries, Tokens


class SharedConv(nn.Sequential):
    """BEV features -> C channels: 3 x 3 convolution, batch norm, ReLU.

    Args:
        in_channels: channels of the BEV map.
        dim: C.
    """

    def __init__(self, *, in_channels: int, dim: int) -> None:
        conv = nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(dim), nn.ReLU())


class Detector(nn.Module):
    """Camera + LiDAR detector. A model with one sensor is the same detector with one grid of tokens.

    Args:
        reference_points: the learned queries.
        bev_embedding: ground position of BEV tokens and of queries.
        decoder: the transformer decoder.
        head: the task heads.
        lidar_branch: points -> BEV map, or None without LiDAR;
            ``forward(points: list of (P_i, 5)) -> (B, C_in, H, W)``.
        shared_conv: BEV map -> (B, C, H, W); required with a lidar_branch or BEV maps.
        image_branch: images -> camera maps, or None without cameras;
            ``forward(images (N, H, W, 3) uint8, *, mask) -> (N, C, h, w)``, N = B * V.
        ray_embedding: ray position of camera tokens and of queries; required with cameras.
        aqr: weighs the sensors for every query; needs both. None: the plain CMT.
        bev_origin: metres x, y where cell (0, 0) of the BEV map begins; required with AQR.
        bev_cell_size: metres along x, y of a BEV cell; required with AQR.
    """

    def __init__(
        self,
        *,
        reference_points: ReferencePoints,
        bev_embedding: BevEmbedding,
        decoder: Decoder,
        head: Heads,
        lidar_branch: nn.Module | None = None,
        shared_conv: nn.Module | None = None,
        image_branch: nn.Module | None = None,
        ray_embedding: RayEmbedding | None = None,
        aqr: BiasRouter | ModulationRouter | None = None,
        bev_origin: tuple[float, float] | None = None,
        bev_cell_size: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if shared_conv is None and ray_embedding is None:
            raise ValueError("a detector needs shared_conv (LiDAR), ray_embedding (cameras), or both; got neither")
        if lidar_branch is not None and shared_conv is None:
            raise ValueError("a detector with a lidar_branch needs a shared_conv")
        if image_branch is not None and ray_embedding is None:
            raise ValueError("a detector with an image_branch needs a ray_embedding")
        if aqr is not None and (shared_conv is None or ray_embedding is None):
            only = "LiDAR" if ray_embedding is None else "cameras"
            raise ValueError(f"AQR weighs LiDAR against cameras, this detector has {only} only")
        if aqr is not None and (bev_origin is None or bev_cell_size is None):
            raise ValueError(
                f"AQR needs the origin and the size of BEV cells in metres, got {bev_origin} and {bev_cell_size}"
            )
        self.image_branch = image_branch
        self.lidar_branch = lidar_branch
        self.shared_conv = shared_conv
        self.bev_embedding = bev_embedding
        self.ray_embedding = ray_embedding
        self.reference_points = reference_points
        self.aqr = aqr
        self.decoder = decoder
        self.head = head
        self.bev_origin = bev_origin
        self.bev_cell_size = bev_cell_size

    def forward(
        self,
        images: Tensor | None,
        points: Sequence[Tensor] | None,
        lidar2img: Tensor | None,
        denoising: DenoisingQueries | None = None,
        *,
        image_mask: Tensor | None = None,
    ) -> Predictions:
        """Detect.

        Args:
            images: (B, V, H, W, 3) uint8, channels R, G, B as decoded; ignored without an image_branch.
            points: per sample (P_i, 5) x, y, z in metres (LiDAR frame), intensity, seconds before the key frame;
                ignored without a lidar_branch.
            lidar2img: (B, V, 4, 4) float64, LiDAR frame -> pixels of ``images``; required with cameras.
            denoising: extra queries in training.
            image_mask: (H, W) bool, True = the pixel is kept: a GridMask in training; None keeps all.
        """
        pv_maps = self.encode_images(images, image_mask)
        bev_map = self.encode_points(points)
        image_size = None if pv_maps is None else tuple(images.shape[2:4])
        return self.forward_features(bev_map, pv_maps, lidar2img, image_size, denoising)

    def forward_features(
        self,
        bev_map: Tensor | None,
        pv_maps: Tensor | None,
        lidar2img: Tensor | None,
        image_size: tuple[int, int] | None,
        denoising: DenoisingQueries | None = None,
    ) -> Predictions:
        """Everything after the branches; one graph for torch.compile.

        Args:
            bev_map: (B, C_in, H, W) output of the lidar_branch, row <- y, col <- x, or None.
            pv_maps: (B, V, C, h, w) output of the image_branch, or None.
            lidar2img, denoising: see :meth:`forward`.
            image_size: (height, width) in pixels of the images that ``lidar2img`` projects into; None without cameras.
        """
        cameras = self.make_cameras(pv_maps, lidar2img, image_size)
        tokens = self.make_tokens(bev_map, pv_maps, cameras)
        queries = self.make_queries(tokens.values.shape[0], cameras, denoising)
        return self.decode(queries, self.route(queries, tokens, cameras))

    def compute_geometry(self, layout: TokenLayout, batch_size: int, cameras: Cameras | None) -> Geometry:
        """Everything before the decoder that does not depend on the maps, for :meth:`forward_with_geometry`.

        Args:
            layout: of :meth:`make_layout`.
        """
        queries = self.make_queries(batch_size, cameras, None)
        windows = None if self.aqr is None else self.aqr.find_windows(queries, layout, cameras)
        return Geometry(self.token_positions(layout, batch_size, cameras), queries, windows)

    def forward_with_geometry(self, bev_map: Tensor | None, pv_maps: Tensor | None, geometry: Geometry) -> Predictions:
        """:meth:`forward_features` with a geometry that is known already, without denoising queries."""
        tokens = self.make_tokens(bev_map, pv_maps, None, geometry.token_positions)
        return self.decode(geometry.queries, self.route(geometry.queries, tokens, None, geometry.windows))

    def decode(self, queries: Queries, routed: Routed) -> Predictions:
        """Decoder and heads."""
        hidden = self.decoder(
            queries.positions,
            routed.tokens.values,
            routed.tokens.positions,
            attention_mask=queries.attention_mask,
            attend=routed.attend,
        )
        predictions = self.head(hidden, queries.reference_points, num_dn=queries.num_dn, is_valid=queries.is_valid)
        return replace(predictions, aqr_weights=self.matching_weights(routed))

    def clamp_parameters(self) -> None:
        """Move parameters with limits (the scale of AQR) back inside them; to be called after every optimizer step."""
        if self.aqr is not None:
            self.aqr.clamp_parameters()

    def encode_images(self, images: Tensor | None, image_mask: Tensor | None = None) -> Tensor | None:
        """Images (B, V, H, W, 3) uint8 -> camera maps (B, V, C, h, w); None without an image_branch.

        H / h and W / w must be one whole number: images that the branch would have to pad are refused, because the
        rays of the tokens need the size after padding.
        """
        if self.image_branch is None:
            return None
        if images is None or images.ndim != 5 or images.shape[-1] != 3:
            got = "None" if images is None else tuple(images.shape)
            raise ValueError(f"images of a detector with cameras must have shape (B, V, H, W, 3), got {got}")
        maps = self.image_branch(images.flatten(0, 1), mask=image_mask)
        (height, width), (rows, cols) = images.shape[2:4], maps.shape[-2:]
        if height % rows or width % cols or height // rows != width // cols:
            raise ValueError(
                f"images of {height} x {width} pixels do not fit camera maps of {rows} x {cols} cells: pad them to a "
                f"multiple of the image branch's stride"
            )
        return maps.unflatten(0, images.shape[:2])

    def encode_points(self, points: Sequence[Tensor] | None) -> Tensor | None:
        """Points, one (P_i, 5) per sample -> BEV map (B, C_in, H, W); None without a lidar_branch."""
        if self.lidar_branch is None:
            return None
        if points is None:
            raise ValueError("points of a detector with LiDAR must be a list of (P, 5) tensors, got None")
        return self.lidar_branch(points)

    def make_cameras(
        self, pv_maps: Tensor | None, lidar2img: Tensor | None, image_size: tuple[int, int] | None
    ) -> Cameras | None:
        """Calibration in the model's dtype; None without camera maps."""
        if pv_maps is None:
            return None
        if lidar2img is None or lidar2img.shape[:2] != pv_maps.shape[:2]:
            got = "None" if lidar2img is None else tuple(lidar2img.shape)
            expected = (*pv_maps.shape[:2], 4, 4)
            raise ValueError(f"lidar2img must have shape {expected} to match the camera maps, got {got}")
        return make_cameras(lidar2img, image_size, dtype=self.reference_points.weight.dtype)

    def make_layout(self, bev_map: Tensor | None, pv_maps: Tensor | None) -> TokenLayout:
        """Grids of the available sensors, BEV first, from the shapes of the maps of :meth:`forward_features`."""
        if (bev_map is None) != (self.shared_conv is None) or (pv_maps is None) != (self.ray_embedding is None):
            raise ValueError(
                f"the detector is built {'without' if self.shared_conv is None else 'with'} LiDAR and "
                f"{'without' if self.ray_embedding is None else 'with'} cameras, got "
                f"{'no' if bev_map is None else 'a'} BEV map and {'no' if pv_maps is None else 'some'} camera maps"
            )
        grids = []
        if bev_map is not None:
            rows, cols = bev_map.shape[-2:]
            grids.append(Grid("lidar", 1, rows, cols, origin=self.bev_origin, cell_size=self.bev_cell_size))
        if pv_maps is not None:
            grids.append(Grid("camera", pv_maps.shape[1], *pv_maps.shape[-2:]))
        return TokenLayout(tuple(grids))

    def make_tokens(
        self,
        bev_map: Tensor | None,
        pv_maps: Tensor | None,
        cameras: Cameras | None,
        positions: Tensor | None = None,
    ) -> Tokens:
        """Tokens of the available sensors; maps and cameras as in :meth:`forward_features`.

        Args:
            positions: of :meth:`token_positions`; None: they are computed.
        """
        layout, values = self.make_layout(bev_map, pv_maps), []
        if bev_map is not None:
            values.append(self.shared_conv(bev_map).flatten(2).transpose(1, 2))
        if pv_maps is not None:
            values.append(pv_maps.permute(0, 1, 3, 4, 2).flatten(1, 3))
        if positions is None:
            positions = self.token_positions(layout, values[0].shape[0], cameras)
        return Tokens(self._join(values, layout), positions, layout)

    def token_positions(self, layout: TokenLayout, batch_size: int, cameras: Cameras | None) -> Tensor:
        """Position embeddings (B, K, C) of the tokens."""
        positions = []
        for grid in layout.grids:
            if grid.name == "camera":
                positions.append(pv_positions(self.ray_embedding, grid.rows, grid.cols, cameras))
            else:
                bev = bev_positions(self.bev_embedding, grid.rows, grid.cols, like=self.reference_points.weight)
                positions.append(bev.expand(batch_size, -1, -1))
        return self._join(positions, layout)

    def _join(self, parts: list[Tensor], layout: TokenLayout) -> Tensor:
        """Tokens (B, K_i, C) of the grids side by side, padded with zeros to the length that suits the attention."""
        length = layout.num_tokens
        if self.aqr is not None:
            length = self.aqr.token_length(layout, parts[0].device)
        if length > layout.num_tokens:
            missing = length - layout.num_tokens
            parts = [*parts, parts[0].new_zeros(parts[0].shape[0], missing, parts[0].shape[2])]
        return torch.cat(parts, dim=1)

    def make_queries(self, batch_size: int, cameras: Cameras | None, denoising: DenoisingQueries | None) -> Queries:
        """Reference points and position embeddings of all queries, denoising rows first."""
        points = self.reference_points(batch_size, denoising)
        positions = query_positions(self.bev_embedding, self.ray_embedding, points, cameras)
        if denoising is None:
            return Queries(points, positions)
        size = denoising.num_dn + self.reference_points.num_queries
        if denoising.attention_mask.shape != (size, size):
            raise ValueError(
                f"the denoising attention mask must have shape {(size, size)} (num_dn + num_queries), "
                f"got {tuple(denoising.attention_mask.shape)}"
            )
        matching = denoising.is_valid.new_ones(self.reference_points.num_queries)
        is_valid = torch.cat((denoising.is_valid, matching))
        return Queries(points, positions, denoising.num_dn, denoising.attention_mask, is_valid)

    def route(
        self, queries: Queries, tokens: Tokens, cameras: Cameras | None, windows: QueryWindows | None = None
    ) -> Routed:
        """What the decoder reads: AQR's tokens and attention, or without AQR the tokens and plain attention."""
        return Routed(tokens) if self.aqr is None else self.aqr(queries, tokens, cameras, windows)

    def matching_weights(self, routed: Routed) -> Tensor | None:
        """AQR weights (B, num_queries, G) of the matching queries, detached; None without AQR."""
        if routed.weights is None:
            return None
        return routed.weights[:, -self.reference_points.num_queries :].detach()
