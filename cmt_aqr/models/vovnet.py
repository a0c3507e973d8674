"""VoVNet with one-shot aggregation and effective squeeze-and-excitation (eSE).

Shapes: N images, C channels, (H, W) pixels or cells.

*Source*: Lee and Park, "CenterMask", CVPR 2020 (VoVNetV2), as used by the original program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.models.stages import check_out_stages, run_blocks

STAGES = (2, 3, 4, 5)


@dataclass(frozen=True)
class VoVNetSpec:
    """Widths and depths. stem: three convolutions; the other tuples have one entry per stage 2, 3, 4, 5."""

    stem: tuple[int, int, int]
    conv_channels: tuple[int, int, int, int]
    out_channels: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    layers: int = 5


V99_ESE = VoVNetSpec(
    stem=(64, 64, 128),
    conv_channels=(128, 160, 192, 224),
    out_channels=(256, 512, 768, 1024),
    blocks=(1, 3, 9, 3),
)


class ConvNorm(nn.Module):
    """Convolution without bias, padded to keep the size at stride 1, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> (N, out_channels, H / stride, W / stride)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class ChannelGate(nn.Module):
    """eSE: scales each channel by hard_sigmoid(fc(mean over the image)), with fc a full C x C layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        return x * F.hardsigmoid(self.fc(x.mean(dim=(2, 3), keepdim=True)))


class AggregationBlock(nn.Module):
    """One-shot aggregation: a chain of 3x3 convolutions, input and every output concatenated, 1x1, gate.

    is_residual adds the block's input to its output.
    """

    def __init__(self, in_channels: int, conv_channels: int, out_channels: int, *, num_layers: int, is_residual: bool):
        super().__init__()
        widths = [in_channels] + [conv_channels] * num_layers
        self.is_residual = is_residual
        self.layers = nn.ModuleList(ConvNorm(before, after, kernel=3) for before, after in pairwise(widths))
        self.concat = ConvNorm(sum(widths), out_channels, kernel=1)
        self.ese = ChannelGate(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, in_channels, H, W) -> (N, out_channels, H, W)."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        out = self.ese(self.concat(torch.cat(outputs, dim=1)))
        return out + x if self.is_residual else out


class VoVNet(nn.Module):
    """Images -> maps of the chosen stages; stage s has stride 2**s.

    out_stages: which of the stages 2 to 5 are returned, ascending; later stages are not built.
    use_checkpoint: see `run_blocks`.

    Names of the official checkpoints: `stem.stem_{i}/x` is `stem.{i-1}.x` here, and
    `stage{s}.OSA{s}_{b}.layers.{i}.OSA{s}_{b}_{i}/x` is `stage{s}.{b-1}.layers.{i}.x`.
    """

    def __init__(self, *, spec: VoVNetSpec = V99_ESE, out_stages: Sequence[int] = (4, 5), use_checkpoint: bool = False):
        super().__init__()
        check_out_stages(out_stages, STAGES)
        self.out_stages = tuple(out_stages)
        self.out_channels = tuple(spec.out_channels[stage - STAGES[0]] for stage in out_stages)
        self.use_checkpoint = use_checkpoint
        first, second, third = spec.stem
        self.stem = nn.Sequential(
            ConvNorm(3, first, kernel=3, stride=2),
            ConvNorm(first, second, kernel=3),
            ConvNorm(second, third, kernel=3, stride=2),
        )
        channels = third
        for i, stage in enumerate(range(STAGES[0], max(out_stages) + 1)):
            blocks = []
            for block in range(spec.blocks[i]):
                blocks.append(
                    AggregationBlock(
                        channels,
                        spec.conv_channels[i],
                        spec.out_channels[i],
                        num_layers=spec.layers,
                        is_residual=block > 0,
                    )
                )
                channels = spec.out_channels[i]
            self.add_module(f"stage{stage}", nn.ModuleList(blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [(N, out_channels[i], ceil(H / 2**s), ceil(W / 2**s))]."""
        x = self.stem(images)
        maps = []
        for stage in range(STAGES[0], self.out_stages[-1] + 1):
            if stage > STAGES[0]:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            x = run_blocks(self.get_submodule(f"stage{stage}"), x, use_checkpoint=self.use_checkpoint)
            if stage in self.out_stages:
                maps.append(x)
        return maps
