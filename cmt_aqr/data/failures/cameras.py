"""Failures of cameras: pure functions of one image as on disk, of a severity and of a random generator.

Images are (H, W, 3) uint8 RGB before any resize; lengths in pixels are pixels of the file, 1600 x 900 in nuScenes. Like
the published programs, these functions compute with numbers in [0, 1] and truncate when they convert back to 0..255.
No function changes its arguments.

*Source*: MultiCorrupt (Beemelmanns et al., 2402.11677), program `converter/img.py`; nuScenes-R (Yu et al., 2205.14951).
"""

import math
from functools import lru_cache

import cv2
import numpy as np

# Motion blur: taps on either side of the middle one, and sigma in taps divided by the strength.
BLUR_RADIUS, BLUR_SIGMA = 15, 100.0
# Dirt on the lens: number of masks, their size before they are rotated by 90 degrees, and the exponent of their
# opacity. Between the two limits lie the shares of a mask that are dirty.
NUM_MASKS, MASK_SIZE, MASK_EXPONENT = 16, (160, 90), 3
DIRTY_SHARE = (0.1, 0.5)
# RGB of dirt where it is thickest.
DIRT = (58, 46, 34)


def brighten(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """The HSV value plus `amount`, clipped at 1; hue and saturation are kept.

    A pixel's value is its largest channel, so all channels are multiplied by (new value / value); black becomes grey.

    Args:
        image: (H, W, 3).
        amount: 0.1, 0.3, 0.5.

    *Source*: MultiCorrupt, brightness.
    """
    value, channel = np.arange(256)[:, None], np.arange(256)
    new = np.minimum(value + 255 * amount, 255)
    table = np.where(value > 0, channel * (new / np.maximum(value, 1)), new).clip(0, 255).astype(np.uint8)
    return table[np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])[..., None], image]


def darken(image: np.ndarray, severity: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Low light: ((x - min) / (max - min))^2 s, with minimum and maximum of the image, then the sensor's noise.

    The noise is shot noise, Poisson(10 p x) / (10 p), and then N(0, 0.1 g); the result of each is clipped to [0, 1].

    Args:
        image: (H, W, 3).
        severity: s, p, g: (0.60, 25, 0.08), (0.40, 12, 0.18), (0.30, 5, 0.26).

    *Source*: MultiCorrupt, darkness (the program applies it by the name `low_light`).
    """
    brightness, photons, noise = severity
    low, high = int(image.min()), int(image.max())
    levels = ((np.arange(256) - low) / max(high - low, 1)).clip(0, 1) ** 2 * brightness
    counted = rng.poisson(10 * photons * levels[image]) / (10 * photons)
    noisy = np.clip(counted, 0, 1) + rng.standard_normal(image.shape, dtype=np.float32) * (0.1 * noise)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def blacken(image: np.ndarray, level: None, rng: np.random.Generator) -> np.ndarray:
    """A black image, so -mean / std after normalisation.

    *Source*: nuScenes-R and MoME, camera drop and view drop; the same as `drop_cameras` in training (*Quirk Q17*).
    """
    return np.zeros_like(image)


def blacken_some(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """A black image with this probability, drawn independently for each image.

    Args:
        image: (H, W, 3).
        probability: 0.2, 0.4, 0.6.

    *Source*: MultiCorrupt, missing camera.
    """
    return np.zeros_like(image) if rng.random() < probability else image


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Motion along a line: 31 copies, tap i shifted by i pixels, weighted exp(-i^2 / (2 (100 s)^2)); edges repeat.

    The angle to the horizontal is uniform in +-45 degrees. The copies move left and up (or down), as in the program.

    Args:
        image: (H, W, 3).
        strength: s: 0.06, 0.10, 0.13.

    *Source*: MultiCorrupt, motion blur of the cameras (radius 15).
    """
    weights = blur_weights(2 * BLUR_RADIUS + 1, BLUR_SIGMA * strength)
    return line_blur(image.astype(np.float32), weights, rng.uniform(-45, 45)).clip(0, 255).astype(np.uint8)


def blur_weights(taps: int, sigma: float) -> np.ndarray:
    """exp(-i^2 / (2 sigma^2)) for i = 0, .., taps - 1, with the sum 1."""
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def line_blur(image: np.ndarray, weights: np.ndarray, degrees: float) -> np.ndarray:
    """Sum of copies of a float image (H, W, ...), copy i shifted by i pixels along a line and weighted; edges repeat.

    *Source*: MultiCorrupt `imgmb`; the shifts are whole pixels, -ceil(i cos - 1/2) along x and -ceil(i sin - 1/2)
    along y.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    height, width = image.shape[:2]
    total = np.zeros_like(image, dtype=np.float32)
    reach = len(weights)
    padded = np.pad(image, ((reach, reach), (reach, reach), *((0, 0),) * (image.ndim - 2)), mode="edge")
    for i, weight in enumerate(weights):
        right, down = -math.ceil(i * cos - 0.5), -math.ceil(i * sin - 0.5)
        if abs(right) >= width or abs(down) >= height:
            break  # of an image smaller than the motion, as in the program
        top, left = reach - down, reach - right
        total += np.float32(weight) * padded[top : top + height, left : left + width]
    return total


def soil(image: np.ndarray, level: None, rng: np.random.Generator) -> np.ndarray:
    """Dirt on the lens: one of 16 masks, rotated by 90 degrees and resized; alpha image + (1 - alpha) mask.

    alpha = (mask / 255)^3, so a mask is white where the lens is clean.

    *Source*: nuScenes-R, occlusion of the lens, as MoME evaluates it. Its 16 pictures of mud and dirt may not be
    redistributed: :func:`dirt_mask` makes smooth blobs that cover 10 to 50 % of the image, evenly spread over the 16
    masks. The coverage of the published masks is not known, so scores of this case cannot be compared with published
    ones.
    """
    height, width = image.shape[:2]
    mask = np.rot90(dirt_mask(int(rng.integers(NUM_MASKS))))
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
    alpha = (mask.astype(np.float32) / 255) ** MASK_EXPONENT
    return (alpha * image + (1 - alpha) * mask).astype(np.uint8)


@lru_cache(maxsize=NUM_MASKS)
def dirt_mask(number: int) -> np.ndarray:
    """Mask `number` of 16: blobs of dirt on white, (160, 90, 3) uint8, in portrait format, before it is rotated.

    The darkest share of a smooth random surface is dirt; the share grows from 10 % to 50 % with the number. A pixel is
    dirty when less than half of the image shows through.
    """
    rng = np.random.default_rng(number)
    rows, cols = MASK_SIZE
    surface = np.zeros((rows, cols))
    for cells, weight in ((3, 1.0), (6, 0.6), (12, 0.35), (24, 0.2)):
        coarse = rng.standard_normal((cells * 2 + 2, cells + 2)).astype(np.float32)
        surface += weight * cv2.resize(coarse, (cols, rows), interpolation=cv2.INTER_CUBIC)
    low, high = DIRTY_SHARE
    threshold = np.quantile(surface, low + (high - low) * number / (NUM_MASKS - 1))
    # The threshold gets the mask value whose cube is a half: pixels below it are dirty.
    darkest = sum(DIRT) / 3 / 255
    half = (0.5 ** (1 / MASK_EXPONENT) - darkest) / (1 - darkest)
    clean = np.clip(half + (surface - threshold) / (0.35 * surface.std()) * (1 - half), 0, 1)[..., None]
    return np.round(255 * clean + (1 - clean) * np.array(DIRT)).astype(np.uint8)
