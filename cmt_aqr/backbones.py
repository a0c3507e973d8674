"""The image backbones by name: the one list that configuration and construction read.

The models are imported when one is made, so that a configuration is checked without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

BackboneName = Literal["resnet18", "resnet50", "vovnet99"]


def make_backbone(name: BackboneName, *, base_channels: int, use_checkpoint: bool) -> nn.Module:
    """Images (N, 3, H, W) -> [stride 16 map, stride 32 map], whose channels are the module's ``out_channels``.

    Args:
        base_channels: width of the first stage, for those that come in any width.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
    """
    if name == "vovnet99":
        from cmt_aqr.models.vovnet import VoVNet

        return VoVNet(use_checkpoint=use_checkpoint)
    from cmt_aqr.models.resnet import ResNet

    depth = {"resnet18": 18, "resnet50": 50}[name]
    return ResNet(depth=depth, base_channels=base_channels, use_checkpoint=use_checkpoint)
