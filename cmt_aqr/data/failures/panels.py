"""Which sensors of a frame a failure has changed, so that pictures can mark them."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.failures.names import Failure


class SensorData(NamedTuple):
    """Images (V, H, W, 3), points (P, 5) and lidar2img (V, 4, 4) of one frame; None without the sensor."""

    images: Tensor | None
    points: Tensor | None
    lidar2img: Tensor | None


def failed_panels(failure: Failure, data: SensorData, clean: SensorData | None) -> dict[str, str]:
    """Camera, or "lidar", -> the failure, for every sensor that it changed.

    Args:
        failure: its name becomes the value.
        data: of the frame under the failure.
        clean: the same frame without the failure; None where it is not known: then every sensor that the failure can
            affect is named.
    """
    name = failure.case if failure.views or not failure.level else f"{failure.case}:{failure.level}"
    sensors = failure.definition.sensors
    names = [camera for camera in failure.views or CAMERAS if "camera" in sensors and data.images is not None]
    if "lidar" in sensors and data.points is not None:
        names.append("lidar")
    return {panel: name for panel in names if clean is None or _has_changed(panel, data, clean)}


def _has_changed(panel: str, data: SensorData, clean: SensorData) -> bool:
    if panel == "lidar":
        return not torch.equal(data.points, clean.points)
    view = CAMERAS.index(panel)
    return any(not torch.equal(own[view], before[view]) for own, before in (
        (data.images, clean.images), (data.lidar2img, clean.lidar2img)))  # fmt: skip
