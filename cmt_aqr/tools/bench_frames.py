"""Frames for the benches: made up with the sizes of a configuration, or those of its validation split."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cmt_aqr.boxes import Targets
from cmt_aqr.build import evaluation_dataset, open_split
from cmt_aqr.classes import CLASSES
from cmt_aqr.config import Config
from cmt_aqr.data.loader import make_loader
from cmt_aqr.data.readers import read_points
from cmt_aqr.data.sample import Batch
from cmt_aqr.data.sampling import EvaluationSampler
from cmt_aqr.tools.attention_cases import nuscenes_lidar2img
from cmt_aqr.tools.bench_sparse import random_cloud, ten_sweeps

NUM_BOXES = 35  # about as many as in a frame of nuScenes
BEV_SHARE = 0.45  # boxes lie in a square around the LiDAR; half its side as a share of the point range's side


def made_up_batch(config: Config, batch_size: int, *, cloud: str | None = None, seed: int = 0) -> Batch:
    """Random images, nuScenes' calibration, ten sweeps of a LiDAR and 35 boxes a frame; in the model's sizes.

    Args:
        cloud: a LiDAR file of nuScenes (.bin), taken ten times with the step of a moving car; None: a made-up scanner.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (0, 0) if config.model.camera is None else config.model.camera.input_size
    images = torch.randint(0, 256, (batch_size, 6, height, width, 3), generator=generator, dtype=torch.uint8)
    lidar2img = nuscenes_lidar2img((height, max(1, width))).expand(batch_size, -1, -1, -1).contiguous()
    points = None
    if config.model.lidar is not None:
        points = [ten_sweeps(read_points(Path(cloud)) if cloud else random_cloud(generator)) for _ in range(batch_size)]
    unit = torch.eye(4, dtype=torch.float64).expand(batch_size, -1, -1).contiguous()
    return Batch(
        tokens=[f"made up {i}" for i in range(batch_size)],
        images=None if config.model.camera is None else images,
        points=points,
        lidar2img=lidar2img,
        targets=[made_up_targets(config.model.point_range, generator) for _ in range(batch_size)],
        lidar2global=unit,
        lidar2ego=unit,
        ego2global=unit,
        augmentation=unit,
    )


def random_points(count: int, point_range: Sequence[float], *, seed: int = 0) -> Tensor:
    """Points (count, 5): those of the made-up scanner, repeated, each time at another place."""
    generator = torch.Generator().manual_seed(seed)
    clouds, total = [], 0
    while total < count:
        cloud = random_cloud(generator)
        cloud[:, :2] += 0.05 * (point_range[3] - point_range[0]) * torch.randn(2, generator=generator)
        clouds.append(cloud)
        total += len(cloud)
    return torch.cat(clouds)[:count]


def made_up_targets(point_range: Sequence[float], generator: torch.Generator) -> Targets:
    """Boxes of the size of cars, on the ground around the LiDAR."""
    side = point_range[3] - point_range[0]
    boxes = torch.zeros(NUM_BOXES, 9)
    boxes[:, :2] = (2 * torch.rand(NUM_BOXES, 2, generator=generator) - 1) * BEV_SHARE * side
    boxes[:, 2] = -1.0
    boxes[:, 3:6] = torch.tensor([4.6, 1.9, 1.7]) * (0.5 + torch.rand(NUM_BOXES, 1, generator=generator))
    boxes[:, 6] = 6 * torch.rand(NUM_BOXES, generator=generator)
    return Targets(boxes, torch.randint(0, len(CLASSES), (NUM_BOXES,), generator=generator))


def validation_batches(config: Config, batch_size: int, count: int) -> list[Batch]:
    """The first batches of the configuration's validation split."""
    index = open_split(config.data, config.data.val_split)
    loader = make_loader(
        evaluation_dataset(config, index),
        sampler=EvaluationSampler(num_frames=len(index), rank=0, world_size=1),
        batch_size=batch_size,
        num_workers=0,
        drop_last=True,
        pin_memory=False,
    )
    return list(islice(loader, count))


Inputs = tuple[Tensor | None, list[Tensor] | None, Tensor]


def inputs_of(batch: Batch) -> Inputs:
    """What a detector is called with."""
    return batch.images, batch.points, batch.lidar2img
