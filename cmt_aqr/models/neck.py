"""The feature pyramid after an image backbone.

Shapes: N images, C channels, (H, W) cells.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class CPFPN(nn.Module):
    """Feature pyramid whose only smoothed level is the finest one.

    Each map passes a 1x1 convolution; coarser ones are added to finer ones after nearest upsampling; a 3x3
    convolution smooths level 0. Names of the official checkpoints: `img_neck.x_convs.{i}.conv.w` is
    `x_convs.{i}.w` here.

    *Source*: PETR, CPFPN.
    """

    def __init__(self, *, in_channels: Sequence[int], channels: int = 256):
        super().__init__()
        self.out_channels = channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the backbone, fine to coarse -> as many maps of `channels` channels, of the same sizes."""
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        return [self.fpn_convs[0](levels[0]), *levels[1:]]
