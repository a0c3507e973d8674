"""2D backbone and neck of the bird's-eye grid: SECOND and its feature pyramid.

Shapes: B batch, C channels, (H, W) = grid cells, H along y and W along x. Parameter names equal those of the
official checkpoints (`pts_backbone.*`, `pts_neck.*` without the prefix).
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor, cat, nn

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM), nn.ReLU(inplace=True)]


def _init_convolutions(module: nn.Module) -> None:
    """Kaiming normal, fan out, for every convolution below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


class SECOND(nn.Module):
    """Stages of 3x3 convolutions; the first convolution of a stage carries its stride.

    in_channels: channels of the grid. channels, layers, strides: one number per stage (layers = convolutions after
    the first one).

    *Source*: mmdet3d SECOND.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: Sequence[int] = (128, 256),
        layers: Sequence[int] = (5, 5),
        strides: Sequence[int] = (1, 2),
    ):
        super().__init__()
        if not len(channels) == len(layers) == len(strides):
            raise ValueError(
                f"SECOND: channels {tuple(channels)}, layers {tuple(layers)} and strides {tuple(strides)} must have "
                "one entry per stage each"
            )
        self.out_channels = tuple(channels)
        self.out_strides = tuple(accumulate(strides, mul))
        blocks = []
        for width, depth, stride in zip(channels, layers, strides, strict=True):
            block: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)]
            block += _norm_relu(width)
            for _ in range(depth):
                block += [nn.Conv2d(width, width, 3, padding=1, bias=False), *_norm_relu(width)]
            blocks.append(nn.Sequential(*block))
            in_channels = width
        self.blocks = nn.ModuleList(blocks)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, C, H, W) -> one map per stage, (B, channels[i], H / out_strides[i], W / out_strides[i])."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class SECONDFPN(nn.Module):
    """Brings every stage to one resolution and concatenates them.

    A stage with upsample stride 1 goes through a 1x1 convolution, one with stride s > 1 through a transposed
    convolution of kernel and stride s.

    *Source*: mmdet3d SECONDFPN with use_conv_for_no_stride.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int] = (128, 256),
        channels: Sequence[int] = (256, 256),
        upsample_strides: Sequence[int] = (1, 2),
    ):
        super().__init__()
        if not len(in_channels) == len(channels) == len(upsample_strides):
            raise ValueError(
                f"SECONDFPN: in_channels {tuple(in_channels)}, channels {tuple(channels)} and upsample_strides "
                f"{tuple(upsample_strides)} must have one entry per stage each"
            )
        self.out_channels = sum(channels)
        deblocks = []
        for width_in, width, stride in zip(in_channels, channels, upsample_strides, strict=True):
            convolution = nn.Conv2d if stride == 1 else nn.ConvTranspose2d
            layer = convolution(width_in, width, stride, stride=stride, bias=False)
            deblocks.append(nn.Sequential(layer, *_norm_relu(width)))
        self.deblocks = nn.ModuleList(deblocks)
        _init_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of SECOND -> (B, sum(channels), H, W); map i is upsampled by upsample_strides[i]."""
        return cat([deblock(x) for deblock, x in zip(self.deblocks, maps, strict=True)], dim=1)
