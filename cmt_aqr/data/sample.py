"""The records that are passed from the files to the network, and the error class for bad data.

Frames: everything in a `Sample` is in one LiDAR frame (x right, y forward, z up, metres). Scene augmentation moves
that frame; `lidar2img`, `lidar2global` and `augmentation` move with it, so they always map from the frame of the
points and boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cmt_aqr.boxes import Targets
from cmt_aqr.errors import UserError


class DataError(UserError):
    """Bad input data: one sentence with the file, the key and both values. Scripts print it and exit with status 2."""


@dataclass(frozen=True)
class Sample:
    """One frame, ready for the network.

    Attributes:
        token: nuScenes sample token.
        images: (V, H, W, 3) uint8 RGB in the order of the index's cameras, or None when the cameras are not used.
        points: (P, 5) float32 x, y, z (metres), intensity (0..255), time lag (s, >= 0, key frame 0), or None.
        lidar2img: (V, 4, 4) float64, [u*d, v*d, d, 1] = lidar2img @ [x, y, z, 1], pixels of `images`.
        targets: ground truth in the LiDAR frame.
        lidar2global: (4, 4) float64; a similarity rather than a rigid transform when the scene was scaled or flipped.
        lidar2ego: (4, 4) float64, rigid, of the LiDAR as mounted (without augmentation).
        ego2global: (4, 4) float64, rigid, ego pose at the LiDAR's time stamp.
        augmentation: (4, 4) float64, LiDAR frame as recorded -> the LiDAR frame of this sample.
    """

    token: str
    images: Tensor | None
    points: Tensor | None
    lidar2img: Tensor
    targets: Targets
    lidar2global: Tensor
    lidar2ego: Tensor
    ego2global: Tensor
    augmentation: Tensor


@dataclass(frozen=True)
class Batch:
    """Several samples; the attributes are those of `Sample` with a leading axis B, or a list where sizes differ.

    Attributes:
        tokens: B sample tokens.
        images: (B, V, H, W, 3) uint8 RGB or None.
        points: B tensors (P_i, 5) float32 or None.
        lidar2img: (B, V, 4, 4) float64.
        targets: B `Targets`.
        lidar2global: (B, 4, 4) float64.
        lidar2ego: (B, 4, 4) float64.
        ego2global: (B, 4, 4) float64.
        augmentation: (B, 4, 4) float64.
    """

    tokens: list[str]
    images: Tensor | None
    points: list[Tensor] | None
    lidar2img: Tensor
    targets: list[Targets]
    lidar2global: Tensor
    lidar2ego: Tensor
    ego2global: Tensor
    augmentation: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, first: int, end: int) -> "Batch":
        """The samples first..end - 1 as a batch that shares their memory."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if value is None else value[first:end] for name, value in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`, dtypes unchanged."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by the loader's pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move) -> "Batch":
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = move(value)
        if self.points is not None:
            moved["points"] = [move(points) for points in self.points]
        moved["targets"] = [Targets(move(targets.boxes), move(targets.labels)) for targets in self.targets]
        return replace(self, **moved)


def collate(samples: Sequence[Sample]) -> Batch:
    """Combine samples to a batch.

    Args:
        samples: at least one; all with images of one size or all without, all with points or all without.

    Returns:
        The batch. Nothing is padded: images have equal sizes by construction, points and boxes stay lists.

    Raises:
        ValueError: when samples with and without images (or points), or of different image sizes, are mixed.
    """
    for name in ("images", "points"):
        present = [getattr(sample, name) is not None for sample in samples]
        if any(present) != all(present):
            raise ValueError(f"collate: {sum(present)} of {len(present)} samples have {name}, expected all or none")
    has_images, has_points = samples[0].images is not None, samples[0].points is not None
    if has_images and len(shapes := {tuple(sample.images.shape) for sample in samples}) > 1:
        raise ValueError(f"collate: images of different shapes {sorted(shapes)}, expected one (V, H, W, 3)")
    return Batch(
        tokens=[sample.token for sample in samples],
        images=torch.stack([sample.images for sample in samples]) if has_images else None,
        points=[sample.points for sample in samples] if has_points else None,
        lidar2img=torch.stack([sample.lidar2img for sample in samples]),
        targets=[sample.targets for sample in samples],
        lidar2global=torch.stack([sample.lidar2global for sample in samples]),
        lidar2ego=torch.stack([sample.lidar2ego for sample in samples]),
        ego2global=torch.stack([sample.ego2global for sample in samples]),
        augmentation=torch.stack([sample.augmentation for sample in samples]),
    )
