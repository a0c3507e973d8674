"""Camera branch: uint8 images -> network input -> backbone -> feature pyramid.

Shapes: B batch, V views, N images (B * V), C channels, (H, W) pixels or cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

CHANNEL_ORDERS = ("bgr", "rgb")
PAD_DIVISOR = 32
STAGES = (1, 2, 3, 4)
# depth -> (block, number of blocks of the four stages)
RESNETS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


def normalize_images(
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "bgr",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(pixel - mean) / std for each channel, in the channel order of the network.

    Args:
        images (..., H, W, 3) uint8 or float, 0 to 255, channels R, G, B as decoded from disk.
        mean, std: three numbers in units of 0 to 255, in `channel_order`.
        channel_order: "bgr" or "rgb", the order the backbone was trained with. *Quirk Q16*: the original weights
            are BGR, with mean 103.530 116.280 123.675.

    Returns:
        (..., 3, H, W) `dtype`, on the device of the images, with the strides of channels-last.
    """
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order is {channel_order!r}; expected one of {CHANNEL_ORDERS}")
    if images.shape[-1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (..., H, W, 3)")
    mean, std = (torch.tensor(values, dtype=dtype, device=images.device) for values in (mean, std))
    if channel_order == "bgr":
        mean, std = mean.flip(0), std.flip(0)
    normalized = (images.to(dtype) - mean) / std
    if channel_order == "bgr":
        normalized = normalized.flip(-1)
    return normalized.movedim(-1, -3)


def pad_images(images: Tensor, *, divisor: int = PAD_DIVISOR) -> Tensor:
    """Zeros below and to the right of (..., H, W) until H and W are multiples of `divisor`.

    Pad after normalising: a padded pixel is 0 in the network's units (the mean colour), not black.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % divisor, 0, -height % divisor))


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, of any width, returning the maps of chosen stages.

    depth: 18, 34 or 50. base_channels: width of the stem, 64 in the published networks. out_stages: which of the
    stages 1 to 4 (stride 2**(stage + 1)) are returned, ascending; later stages are not built.
    use_checkpoint: recompute each block in the backward pass instead of keeping its activations. A batch norm in
    training mode then updates its running statistics twice per step.

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
        if not out_stages or not set(out_stages) <= set(STAGES) or list(out_stages) != sorted(set(out_stages)):
            raise ValueError(f"out_stages is {tuple(out_stages)}; expected ascending stages out of {STAGES}")
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
            for block in self.get_submodule(f"layer{stage}"):
                is_recomputed = self.use_checkpoint and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if is_recomputed else block(x)
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


class ImageBranch(nn.Module):
    """Images -> perspective-view feature map of stride 16: normalisation, GridMask, padding, backbone, neck.

    mean, std, channel_order: see `normalize_images`. They are plain numbers, so they are exact in every dtype.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: str = "bgr",
        backbone: nn.Module,
        neck: CPFPN,
    ):
        super().__init__()
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.channel_order = channel_order
        self.backbone = backbone
        self.neck = neck

    def forward(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Level 0 of the pyramid; the head uses no other.

        Args:
            images (N, H, W, 3) uint8 RGB, N = B * V.
            mask (H, W), True or 1 = the pixel is kept: one GridMask for the whole batch. Hidden pixels become 0
                after normalising.

        Returns:
            (N, C, h, w) with C = neck.out_channels and h, w = H, W rounded up to multiples of 32, divided by 16.
        """
        dtype = self.neck.lateral_convs[0].weight.dtype
        x = normalize_images(images, mean=self.mean, std=self.std, channel_order=self.channel_order, dtype=dtype)
        if mask is not None:
            x = x * mask
        # On CPU, oneDNN's weight gradient of a strided 1x1 convolution writes past its memory when the layout is
        # channels-last and fewer than 16 channels come in (oneDNN issue 6035); on CUDA channels-last is the fast one.
        layout = torch.channels_last if x.is_cuda else torch.contiguous_format
        return self.neck(self.backbone(pad_images(x).contiguous(memory_format=layout)))[0]
