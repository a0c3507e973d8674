"""Fog and snow in camera images: pure functions of one image as on disk, of a severity and of a random generator.

Images are (H, W, 3) uint8 RGB before any resize. The fog of the LiDAR is in `lidar.py`; snow on the LiDAR is left out,
because its published definition needs labels of the ground's points.

*Source*: MultiCorrupt (Beemelmanns et al., 2402.11677), program `converter/img.py`, after ImageNet-C (Hendrycks and
Dietterich, ICLR 2019).
"""

import math

import cv2
import numpy as np

from cmt_aqr.data.failures.cameras import blur_weights, line_blur

# Haze: by how much the height of the random surface falls from one level of detail to the next, and the weights of the
# two other surfaces, which thin and thicken it.
DECAY, THINNING, THICKENING = 1.7, 0.8, 0.5
# Grey of the air, and the part of the image that counts as near: rows and columns as shares of height and width.
AIR = 0.5
NEAR_ROWS, NEAR_COLS = (0.65, 0.99), (0.1, 0.85)
# Factor on an image in snow, in addition to that of the severity.
SNOW_BRIGHTNESS = 0.9


def fog(image: np.ndarray, severity: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Haze of uneven thickness, then fog that grows with the distance from the camera.

    Haze: (x + h surface) m / (m + h), with m the image's largest value and the surface a plasma fractal in [0, 1] times
    (1 - 0.8 fractal) times (1 + 0.5 fractal), three different fractals. Air: x t + 0.5 (1 - t) with t = exp(-beta d),
    d = sqrt(longer side) + 2 q (1 + u / 4), u uniform in [0, 1] for every pixel, and q the distance in pixels to the
    rectangle of rows 65..99 % and columns 10..85 %.

    Args:
        image: (H, W, 3).
        severity: its first two numbers, h and beta: (2, 0.0005), (3, 0.001), (4, 0.002); the others are the LiDAR's.

    *Source*: MultiCorrupt, fog of the cameras.
    """
    haze, beta = severity[:2]
    height, width = image.shape[:2]
    size = 2 ** math.ceil(math.log2(max(height, width)))
    surface, thinner, thicker = (plasma_fractal(size, rng)[:height, :width] for _ in range(3))
    surface = surface * (1 - THINNING * thinner) * (1 + THICKENING * thicker)
    pixels = image.astype(np.float32) / 255
    brightest = float(pixels.max())
    pixels = np.clip((pixels + haze * surface[..., None]) * (brightest / (brightest + haze)), 0, 1)
    distance = math.sqrt(max(height, width)) + 2 * distance_to_road(height, width) * (
        1 + rng.random((height, width), dtype=np.float32) / 4
    )
    seen = np.exp(-beta * distance)[..., None]
    return ((pixels * seen + AIR * (1 - seen)) * 255).astype(np.uint8)


def distance_to_road(height: int, width: int) -> np.ndarray:
    """(height, width) float32: distance in pixels to the rectangle at the lower middle of the image, 0 inside."""
    rows, cols = np.arange(height), np.arange(width)
    top, bottom = (int(height * share) for share in NEAR_ROWS)
    left, right = (int(width * share) for share in NEAR_COLS)
    down = np.maximum(0, np.maximum(rows - bottom, top - rows))
    across = np.maximum(0, np.maximum(cols - right, left - cols))
    return np.hypot(down[:, None], across[None]).astype(np.float32)


def plasma_fractal(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random surface on a torus (size, size) in [0, 1], size a power of 2, by the diamond-square method.

    The middle of every square, then of every diamond, is the mean of its four corners plus a uniform number in +-w^2;
    w begins at 100 and is divided by 1.7 when the squares are halved.
    """
    surface = np.zeros((size, size), np.float32)
    step, spread = size, 100.0
    while step >= 2:
        half = step // 2

        def noisy(total: np.ndarray, spread: float = spread) -> np.ndarray:
            noise = rng.random(total.shape, dtype=np.float32)
            return total / 4 + np.float32(spread**2) * (2 * noise - 1)

        corners = surface[::step, ::step]
        right = corners + np.roll(corners, -1, axis=1)
        below = corners + np.roll(corners, -1, axis=0)
        middles = noisy(right + np.roll(right, -1, axis=0))
        surface[half::step, half::step] = middles
        surface[::step, half::step] = noisy(right + middles + np.roll(middles, 1, axis=0))
        surface[half::step, ::step] = noisy(below + middles + np.roll(middles, 1, axis=1))
        step, spread = half, spread / DECAY
    surface -= surface.min()
    return surface / max(float(surface.max()), 1e-9)


def snow(
    image: np.ndarray, severity: tuple[float, float, float, int, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Falling flakes in front of a paler image.

    Flakes: noise N(mean, 0.3) for every pixel, its middle magnified by `zoom`, 0 where below `threshold`, blurred along
    a line of 2 `radius` + 1 taps (:func:`cmt_aqr.data.failures.cameras.line_blur`) at -135 to -45 degrees. Image:
    0.9 (c x + (1 - c) max(x, 1.5 grey + 0.5)), plus the flakes, plus the flakes rotated by 180 degrees.

    Args:
        image: (H, W, 3).
        severity: mean, zoom, threshold, radius, sigma (taps), c: (0.3, 5, 0.9, 7, 7, 0.9),
            (0.4, 4, 0.85, 8, 8, 0.85), (0.5, 3, 0.8, 10, 10, 0.8).

    *Source*: MultiCorrupt, snow of the cameras. OpenCV magnifies the noise here, SciPy does there.
    """
    mean, zoom, threshold, radius, sigma, clearness = severity
    height, width = image.shape[:2]
    noise = rng.standard_normal((height, width), dtype=np.float32) * np.float32(0.3) + np.float32(mean)
    part = (math.ceil(height / zoom), math.ceil(width / zoom))
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    noise = noise[top : top + part[0], left : left + part[1]]
    flakes = cv2.resize(noise, (round(part[1] * zoom), round(part[0] * zoom)), interpolation=cv2.INTER_LINEAR)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = line_blur(flakes, blur_weights(2 * radius + 1, sigma), rng.uniform(-135, -45))[:height, :width]
    flakes = (np.round(flakes * 255) / 255)[..., None]
    pixels = image.astype(np.float32) / 255
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    pixels = clearness * pixels + (1 - clearness) * np.maximum(pixels, 1.5 * grey + 0.5)
    bright = SNOW_BRIGHTNESS * pixels + flakes + np.rot90(flakes, 2)
    return (np.clip(bright, 0, 1) * 255).astype(np.uint8)
