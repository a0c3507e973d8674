"""Camera branch: uint8 images -> network input -> backbone -> feature pyramid.

Shapes: B batch, V views, N images (B * V), C channels, (H, W) pixels or cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.models.neck import CPFPN

CHANNEL_ORDERS = ("bgr", "rgb")
PAD_DIVISOR = 32


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
        """Level 0 of the pyramid; the head uses no other. Arguments as in :meth:`prepare`.

        Returns:
            (N, C, h, w) with C = neck.out_channels and h, w = H, W rounded up to multiples of 32, divided by 16.
        """
        return self.neck(self.backbone(self.prepare(images, mask=mask)))[0]

    def prepare(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Images as the backbone takes them: normalised, masked, padded.

        Args:
            images (N, H, W, 3) uint8 RGB, N = B * V.
            mask (H, W), True or 1 = the pixel is kept: one GridMask for the whole batch. Hidden pixels become 0
                after normalising.

        Returns:
            (N, 3, H, W), H and W rounded up to multiples of 32.
        """
        dtype = self.neck.lateral_convs[0].weight.dtype
        x = normalize_images(images, mean=self.mean, std=self.std, channel_order=self.channel_order, dtype=dtype)
        if mask is not None:
            x = x * mask
        # On CPU, oneDNN's weight gradient of a strided 1x1 convolution writes past its memory when the layout is
        # channels-last and fewer than 16 channels come in (oneDNN issue 6035); on CUDA channels-last is the fast one.
        layout = torch.channels_last if x.is_cuda else torch.contiguous_format
        return pad_images(x).contiguous(memory_format=layout)
