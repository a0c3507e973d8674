"""ResNet: torchvision's blocks in a backbone of any width.

Shapes: N images, C channels, (H, W) pixels or cells.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from cmt_aqr.models.stages import check_out_stages, run_blocks

STAGES = (1, 2, 3, 4)
# depth -> (block, number of blocks of the four stages)
RESNETS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, of any width, returning the maps of chosen stages.

    depth: 18, 34 or 50. base_channels: width of the stem, 64 in the published networks. out_stages: which of the
    stages 1 to 4 (stride 2**(stage + 1)) are returned, ascending; later stages are not built.
    use_checkpoint: see `run_blocks`.

    Parameter names equal torchvision's, and those of the official checkpoints without `img_backbone.`.
    """

    def __init__(
        self,
        *,
        depth: int = 50,
        base_channels: int = 64,
        out_stages: Sequence[int] = (3, 4),
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if depth not in RESNETS:
            raise ValueError(f"ResNet depth is {depth}; expected one of {tuple(RESNETS)}")
        check_out_stages(out_stages, STAGES)
        block, num_blocks = RESNETS[depth]
        widths = [base_channels * 2**i for i in range(len(STAGES))]
        self.out_stages = tuple(out_stages)
        self.out_channels = tuple(widths[stage - 1] * block.expansion for stage in out_stages)
        self.use_checkpoint = use_checkpoint
        self.conv1 = nn.Conv2d(3, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        channels = base_channels
        for stage in range(1, max(out_stages) + 1):
            width = widths[stage - 1]
            stride = 1 if stage == 1 else 2
            self.add_module(f"layer{stage}", _resnet_stage(block, channels, width, num_blocks[stage - 1], stride))
            channels = width * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [(N, out_channels[i], ceil(H / stride), ceil(W / stride))]."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for stage in range(1, self.out_stages[-1] + 1):
            x = run_blocks(self.get_submodule(f"layer{stage}"), x, use_checkpoint=self.use_checkpoint)
            if stage in self.out_stages:
                maps.append(x)
        return maps


def _resnet_stage(block: type[nn.Module], in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    channels = width * block.expansion
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
    blocks = [block(in_channels, width, stride, shortcut)]
    blocks += [block(channels, width) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
