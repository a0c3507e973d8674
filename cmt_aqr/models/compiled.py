"""A detector whose stages are graphs of torch.compile, for training.

Shape letters: B batch, V views, H, W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmt_aqr.models.detector import Detector
from cmt_aqr.predictions import DenoisingQueries, Predictions


class CompiledDetector(nn.Module):
    """Called as its detector, whose weights and modes it shares; one graph for the images, one for the BEV map, one for
    everything after them. Voxels and the sparse encoder stay in eager mode: their sizes depend on the points.

    Each graph is compiled when it is called for the first time, and for every batch size, training or evaluation mode
    anew. Random numbers (dropout) are others than in eager mode, the same for the same seed.

    Args:
        detector: evaluation and checkpoints use it as it is.
        masks_images: whether some calls have an image mask; those without get one that keeps all, so that there is one
            graph.
        backend: of torch.compile.
    """

    def __init__(self, detector: Detector, *, masks_images: bool, backend: str = "inductor") -> None:
        super().__init__()
        self.detector = detector
        self.masks_images = masks_images

        def compiled(function, **options):
            return torch.compile(function, dynamic=False, backend=backend, **options)

        self._encode_images = compiled(detector.encode_images)
        self._encode_grid = None
        if detector.lidar_branch is not None:
            self._encode_grid = compiled(detector.lidar_branch.encode_grid, fullgraph=True)
        self._forward_features = compiled(detector.forward_features, fullgraph=True)

    def forward(
        self,
        images: Tensor | None,
        points: Sequence[Tensor] | None,
        lidar2img: Tensor | None,
        denoising: DenoisingQueries | None = None,
        *,
        image_mask: Tensor | None = None,
    ) -> Predictions:
        """As :meth:`Detector.forward`."""
        detector, pv_maps, bev_map, image_size = self.detector, None, None, None
        if detector.image_branch is not None:
            image_size = tuple(images.shape[2:4])
            if image_mask is None and self.masks_images:
                image_mask = torch.ones(image_size, dtype=torch.bool, device=images.device)
            pv_maps = self._encode_images(images, image_mask)
        if detector.lidar_branch is not None:
            branch = detector.lidar_branch
            bev_map = self._encode_grid(branch.encoder(branch.voxelize(points)))
        return self._forward_features(bev_map, pv_maps, lidar2img, image_size, denoising)
