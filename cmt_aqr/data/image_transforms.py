"""Image augmentation: one draw per frame, its effect on pixels, and its effect on `lidar2img`.

The draw (random), the pixels and the matrix are three separate functions, so that a stored draw can be replayed.
Pixel coordinates are continuous, u right and v down; a flip maps u to width - u.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageDraw:
    """What happens to every view of one frame: resize, crop, flip, rotate, in this order.

    Attributes:
        resize: scale factor before truncation to whole pixels.
        size: (width, height) of the resized image.
        crop: x0, y0, x1, y1 in the resized image; parts outside it are black.
        flip: mirror left and right.
        rotate: degrees, counter-clockwise on the screen, about the centre of the crop.
    """

    resize: float
    size: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool
    rotate: float


@dataclass(frozen=True)
class ImageAugmentation:
    """Ranges of the random image augmentation of training.

    Attributes:
        resize_range: scale factor, uniform.
        bottom_crop_range: fraction of the resized height cut off at the bottom, uniform.
        rotate_range: degrees, uniform.
        flip: mirror with probability 0.5.
    """

    resize_range: tuple[float, float]
    bottom_crop_range: tuple[float, float] = (0.0, 0.0)
    rotate_range: tuple[float, float] = (0.0, 0.0)
    flip: bool = True


def draw_image_augmentation(
    rng: np.random.Generator | np.random.RandomState,
    *,
    image_size: tuple[int, int],
    final_size: tuple[int, int],
    augmentation: ImageAugmentation,
) -> ImageDraw:
    """Draw one augmentation for all views of a frame.

    Args:
        rng: numpy generator; the calls and their order are the original's.
        image_size: (height, width) of the images on disk.
        final_size: (height, width) of the network's input.
        augmentation: the ranges.

    Returns:
        The draw; the crop has `final_size`.

    *Source*: CMT `ResizeCropFlipImage._sample_augmentation`.
    """
    height, width = image_size
    final_height, final_width = final_size
    resize = float(rng.uniform(*augmentation.resize_range))
    new_width, new_height = int(width * resize), int(height * resize)
    top = int((1 - rng.uniform(*augmentation.bottom_crop_range)) * new_height) - final_height
    left = int(rng.uniform(0, max(0, new_width - final_width)))
    flip = bool(augmentation.flip and rng.choice([0, 1]))
    rotate = float(rng.uniform(*augmentation.rotate_range))
    return ImageDraw(resize, (new_width, new_height), (left, top, left + final_width, top + final_height), flip, rotate)


def fixed_image_draw(*, image_size: tuple[int, int], final_size: tuple[int, int]) -> ImageDraw:
    """The fixed transformation of evaluation: fill the final size, keep the bottom rows and the middle columns.

    Args:
        image_size: (height, width) of the images on disk.
        final_size: (height, width) of the network's input.

    Returns:
        The draw, without flip and rotation.

    *Source*: CMT `ResizeCropFlipImage._sample_augmentation`, `training=False`.
    """
    height, width = image_size
    final_height, final_width = final_size
    resize = max(final_height / height, final_width / width)
    new_width, new_height = int(width * resize), int(height * resize)
    top, left = new_height - final_height, max(0, new_width - final_width) // 2
    return ImageDraw(resize, (new_width, new_height), (left, top, left + final_width, top + final_height), False, 0.0)


def image_matrix(draw: ImageDraw) -> Tensor:
    """Pixels on disk -> pixels of the network's input.

    The resize factor is the exact one, although pixels are resized to whole numbers, rounded to float32: both as in the
    original, whose matrices this reproduces bit for bit where nothing is rotated.

    Args:
        draw: the augmentation.

    Returns:
        (4, 4) float64, acting on [u*d, v*d, d, 1], so that lidar2img' = image_matrix @ lidar2img.

    *Source*: CMT `ResizeCropFlipImage._img_transform`.
    """
    left, top, right, bottom = draw.crop
    resize = float(np.float32(draw.resize))
    matrix = torch.tensor([[resize, 0, -left], [0, resize, -top], [0, 0, 1]], dtype=torch.float64)
    if draw.flip:
        mirror = torch.tensor([[-1, 0, right - left], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
        matrix = mirror @ matrix
    if draw.rotate != 0:
        cos, sin = math.cos(math.radians(draw.rotate)), math.sin(math.radians(draw.rotate))
        x, y = (right - left) / 2, (bottom - top) / 2
        turn = [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y], [0, 0, 1]]
        matrix = torch.tensor(turn, dtype=torch.float64) @ matrix
    full = torch.eye(4, dtype=torch.float64)
    full[:3, :3] = matrix
    return full


def transform_image(image: np.ndarray, draw: ImageDraw, out: np.ndarray) -> None:
    """Resize, crop, flip and rotate one image.

    Args:
        image: (H, W, 3) uint8, as decoded.
        draw: the augmentation.
        out: (h, w, 3) uint8 of the crop's size, contiguous, overwritten.

    *Source*: CMT `ResizeCropFlipImage._img_transform` (OpenCV bilinear resize of the uint8 image, no antialiasing).
    """
    left, top, right, bottom = draw.crop
    if _is_halved_within(image, draw):
        # At half size every pixel is the mean of its own 2 x 2 pixels, so the crop alone can be resized, directly into
        # the output. By another factor the interpolation would have other phases than for the whole image.
        part = image[2 * top : 2 * bottom, 2 * left : 2 * right]
        inside = cv2.resize(part, (right - left, bottom - top), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        inside = _crop(_resize(image, draw.size), draw.crop)
    if inside.shape != out.shape:
        y, x = max(-top, 0), max(-left, 0)
        padded = np.zeros_like(out)
        padded[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        inside = padded
    if draw.flip:
        inside = cv2.flip(inside, 1)
    if draw.rotate != 0:
        size = (right - left, bottom - top)
        turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), draw.rotate, scale=1.0)
        inside = cv2.warpAffine(inside, turn, size)
    if inside is not out:
        out[:] = inside


def _is_halved_within(image: np.ndarray, draw: ImageDraw) -> bool:
    """Whether the image is resized to exactly half, and the crop needs no black pixels."""
    left, top, right, bottom = draw.crop
    width, height = draw.size
    return image.shape[:2] == (2 * height, 2 * width) and 0 <= left < right <= width and 0 <= top < bottom <= height


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image resized to (width, height); the image itself when it has that size."""
    if image.shape[:2] == (size[1], size[0]):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def _crop(image: np.ndarray, crop: tuple[int, int, int, int]) -> np.ndarray:
    """The part of a crop (x0, y0, x1, y1) that lies inside the image."""
    left, top, right, bottom = crop
    return image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
