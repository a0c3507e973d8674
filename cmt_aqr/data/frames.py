"""A frame of the index as a sample: first without sensor data, then with its views at the network's size."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from cmt_aqr.box_format import BoxChoice
from cmt_aqr.data.image_transforms import ImageDraw, image_matrix, transform_image
from cmt_aqr.data.index import Frame
from cmt_aqr.data.sample import Sample


def bare_sample(frame: Frame, boxes: BoxChoice) -> Sample:
    """The frame without sensor data; `lidar2img` in pixels on disk."""
    lidar2ego = torch.tensor(frame.lidar2ego, dtype=torch.float64)
    ego2global = torch.tensor(frame.ego2global, dtype=torch.float64)
    return Sample(
        token=frame.token,
        images=None,
        points=None,
        lidar2img=torch.stack([camera.lidar2img() for camera in frame.cameras]),
        targets=frame.targets(boxes),
        lidar2global=ego2global @ lidar2ego,
        lidar2ego=lidar2ego,
        ego2global=ego2global,
        augmentation=torch.eye(4, dtype=torch.float64),
    )


def finish_images(sample: Sample, views: Iterable[np.ndarray] | None, draw: ImageDraw) -> Sample:
    """Bring the views to the network's size; `lidar2img` follows. `views` None (sensor dropped) gives black images."""
    left, top, right, bottom = draw.crop
    shape = (len(sample.lidar2img), bottom - top, right - left, 3)
    if views is None:
        images = np.zeros(shape, dtype=np.uint8)
    else:
        images = np.empty(shape, dtype=np.uint8)
        for out, view in zip(images, views, strict=True):
            transform_image(view, draw, out)
    return replace(sample, images=torch.from_numpy(images), lidar2img=image_matrix(draw) @ sample.lidar2img)
