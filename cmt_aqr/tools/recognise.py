"""Recognise what a file of weights probably is, from the names of its tensors."""

from collections.abc import Iterable

# First words of the names of this package's detectors.
OWN = ("image_branch.", "lidar_branch.", "reference_points.", "shared_conv.")
PARTS = {"camera": "img_backbone.", "lidar": "pts_middle_encoder."}
# Sensors and backbone of an official file -> the configuration that it belongs to.
OFFICIAL = {
    ("ResNet", True): "cmt_r50_800x320",
    ("VoVNet", True): "cmt_vov_1600x640",
    ("VoVNet", False): "cmt_camera_vov_1600x640",
    (None, True): "cmt_lidar_0075",
}


def recognise(names: Iterable[str]) -> tuple[str, str]:
    """The kind of a file (``own``, ``detector``, ``backbone`` or ``unknown``), and what it seems to be, in words."""
    names = list(names)
    if any(name.startswith(OWN) for name in names):
        return "own", "weights with the names of this project"
    backbone = _backbone_of(names)
    if any(name.startswith("pts_bbox_head.") for name in names):
        has_lidar = any(name.startswith(PARTS["lidar"]) for name in names)
        model = OFFICIAL.get((backbone, has_lidar))
        return "detector", f"the official model of {model}" if model else "a detector of CMT's family"
    if backbone is not None:
        return "backbone", f"an image backbone alone, {backbone}"
    return "unknown", "no model that is known here"


def _backbone_of(names: list[str]) -> str | None:
    # At the start of a name only, because the sparse encoder has an encoder_layer1.
    if any(
        name.startswith(("layer1.0.conv1.", "backbone.layer1.0.conv1.", "img_backbone.layer1.0.")) for name in names
    ):
        return "ResNet"
    return "VoVNet" if any("OSA2_1" in name for name in names) else None
