"""Failures of cameras, weather among them: pixels computed by hand, on made-up images and on the real frame."""

import colorsys
import math

import numpy as np
import pytest

from cmt_aqr.data.failures import cameras, weather


def random_image(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def contrast(image: np.ndarray) -> float:
    """Mean step between neighbouring columns."""
    return np.abs(np.diff(image.astype(float), axis=1)).mean()


def brightened_by_hand(pixel: np.ndarray, amount: float) -> list[float]:
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    return [255 * channel for channel in colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))]


@pytest.mark.parametrize("amount", (0.1, 0.3, 0.5))
def test_brightness_by_pixel(rng, amount):
    image = random_image()
    image[0, 0], image[0, 1] = 0, (255, 0, 0)
    found = cameras.brighten(image, amount, rng)
    for row, col in ((0, 0), (0, 1), (5, 7), (20, 33), (11, 2)):
        assert found[row, col] == pytest.approx(brightened_by_hand(image[row, col], amount), abs=1)
    assert (found >= image).all()


@pytest.mark.parametrize("severity", ((0.60, 25, 0.08), (0.40, 12, 0.18), (0.30, 5, 0.26)))
def test_darkness_in_mean_and_spread(rng, severity):
    brightness, photons, noise = severity
    image = np.full((300, 300, 3), 200, np.uint8)
    image[0, 0], image[0, 1] = 20, 240  # the darkest and the brightest pixel set the scale
    found = cameras.darken(image, severity, rng)[10:].astype(float)
    expected = ((200 - 20) / 220) ** 2 * brightness
    spread = math.sqrt(expected / (10 * photons) + (0.1 * noise) ** 2)
    assert found.mean() / 255 == pytest.approx(expected, abs=0.004)
    assert found.std() / 255 == pytest.approx(spread, rel=0.03)
    assert cameras.darken(np.zeros((9, 9, 3), np.uint8), severity, rng).mean() < 20


def test_black_images(rng):
    image = random_image()
    assert not cameras.blacken(image, None, rng).any() and image.any()
    for probability in (0.2, 0.6):
        results = [cameras.blacken_some(image, probability, np.random.default_rng(seed)) for seed in range(300)]
        black = [not result.any() for result in results]
        assert abs(np.mean(black) - probability) < 0.08
        assert all(result is image for result, is_black in zip(results, black, strict=True) if not is_black)


def test_motion_blur_draws_the_line_of_its_weights():
    image = np.zeros((101, 101), np.float32)
    image[50, 50] = 1
    weights = cameras.blur_weights(31, 10.0)
    assert weights.sum() == pytest.approx(1) and weights[10] / weights[0] == pytest.approx(math.exp(-0.5))
    flat = cameras.line_blur(image, weights, 0.0)
    assert flat[50, 20:51] == pytest.approx(weights[::-1]) and flat.sum() == pytest.approx(1)
    steep = cameras.line_blur(image, weights, 30.0)
    for i in (0, 7, 30):
        row = 50 - math.ceil(i * math.sin(math.radians(30)) - 0.5)
        assert steep[row, 50 - math.ceil(i * math.cos(math.radians(30)) - 0.5)] >= weights[i] * 0.999
    edge = cameras.line_blur(np.ones((40, 60), np.float32), weights, 45.0)
    assert edge == pytest.approx(1, abs=1e-5)  # the edge repeats
    column = np.zeros((9, 60), np.float32)
    column[:, 59] = 1
    assert cameras.line_blur(column, weights, 0.0)[4, 59] == pytest.approx(1, abs=1e-5)


def test_motion_blur_of_an_image(rng):
    image = random_image(60, 80)
    angles = set()
    for seed in range(20):
        generator = np.random.default_rng(seed)
        angle = np.random.default_rng(seed).uniform(-45, 45)
        expected = cameras.line_blur(image.astype(np.float32), cameras.blur_weights(31, 13.0), angle)
        assert np.array_equal(cameras.blur(image, 0.13, generator), expected.astype(np.uint8))
        angles.add(round(angle))
    assert len(angles) > 15 and min(angles) < -20 and max(angles) > 20
    assert cameras.blur(image, 0.06, rng).std() > cameras.blur(image, 0.13, rng).std()


def test_dirt_covers_what_it_says(rng):
    shares = []
    for number in range(16):
        mask = cameras.dirt_mask(number)
        assert mask.shape == (160, 90, 3) and mask.dtype == np.uint8
        shares.append(((mask.mean(axis=2) / 255) ** 3 < 0.5).mean())
    assert shares == pytest.approx(np.linspace(0.1, 0.5, 16), abs=0.01)
    image = np.full((90, 160, 3), 200, np.uint8)
    found = {cameras.soil(image, None, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert len(found) == 16
    mask = np.rot90(cameras.dirt_mask(int(np.random.default_rng(4).integers(16)))).astype(float)
    alpha = (mask / 255) ** 3
    soiled = cameras.soil(image, None, np.random.default_rng(4))
    assert np.abs(soiled - (alpha * 200 + (1 - alpha) * mask)).max() <= 1


def test_plasma_is_a_surface_on_a_torus(rng):
    surface = weather.plasma_fractal(128, rng)
    assert surface.shape == (128, 128) and surface.min() == 0 and surface.max() == 1
    step = np.abs(np.diff(np.concatenate((surface, surface[:, :1]), axis=1), axis=1))
    assert step[:, -1].mean() == pytest.approx(step.mean(), rel=0.5)
    assert step.mean() < 0.1 * np.abs(surface[:, :64] - surface[:, 64:]).mean() * 3
    # A plane of zeros and one random number: the first two points of the method, by hand.
    draws = np.random.default_rng(0)
    first = 10_000 * (2 * draws.random((1, 1), dtype=np.float32)[0, 0] - 1)
    second = first / 2 + 10_000 * (2 * draws.random((1, 1), dtype=np.float32)[0, 0] - 1)
    third = first / 2 + 10_000 * (2 * draws.random((1, 1), dtype=np.float32)[0, 0] - 1)
    heights = np.array([[0, second], [third, first]])
    expected = (heights - heights.min()) / np.ptp(heights)
    assert weather.plasma_fractal(2, np.random.default_rng(0)) == pytest.approx(expected, abs=1e-5)


def test_the_road_is_near():
    distance = weather.distance_to_road(900, 1600)
    assert distance[585, 160] == distance[891, 1360] == distance[700, 800] == 0
    assert distance[0, 800] == 585 and distance[700, 0] == 160
    assert distance[0, 0] == pytest.approx(math.hypot(585, 160)) and distance[899, 1599] == pytest.approx(
        math.hypot(8, 239)
    )


@pytest.mark.parametrize(("haze", "beta"), ((2, 0.0005), (4, 0.002)))
def test_fog_between_its_bounds(rng, haze, beta):
    image = np.full((90, 160, 3), 128, np.uint8)
    found = weather.fog(image, (haze, beta), rng).astype(float) / 255
    brightest = 128 / 255
    # The surface lies in [0, 1.5], times the haze; distances in sqrt(160) + 2 q .. 2.5 q.
    low = brightest * brightest / (brightest + haze)
    high = min((brightest + 1.5 * haze) * brightest / (brightest + haze), 1)
    distance = math.sqrt(160) + 2 * weather.distance_to_road(90, 160)[..., None]
    farthest = math.sqrt(160) + 2.5 * weather.distance_to_road(90, 160)[..., None]
    for base in (low, high):
        bounds = [base * t + 0.5 * (1 - t) for t in (np.exp(-beta * distance), np.exp(-beta * farthest))]
        assert (found >= np.minimum(*bounds) - 1 / 255).all() if base == low else (found <= np.maximum(*bounds)).all()
    clear = weather.fog(image, (1e-6, beta), rng).astype(float) / 255
    seen = np.exp(-beta * (distance + farthest) / 2)
    assert np.abs(clear - (brightest * seen + 0.5 * (1 - seen))).max() < 0.01


def test_snow_without_flakes_and_with(rng):
    image = random_image(90, 160)
    pale = weather.snow(image, (-9, 5, 0.9, 7, 7, 0.9), rng).astype(float)  # flakes need noise above 0.9
    pixels = image / 255
    grey = (pixels @ (0.299, 0.587, 0.114))[..., None]
    expected = 0.9 * (0.9 * pixels + 0.1 * np.maximum(pixels, 1.5 * grey + 0.5))
    assert np.abs(pale - 255 * expected.clip(0, 1)).max() <= 1
    dark = np.zeros((90, 160, 3), np.uint8)
    base = 255 * 0.9 * 0.1 * 0.5
    shares = []
    for severity in ((0.3, 5, 0.9, 7, 7, 0.9), (0.4, 4, 0.85, 8, 8, 0.9), (0.5, 3, 0.8, 10, 10, 0.9)):
        snowy = weather.snow(dark, severity, np.random.default_rng(0))
        assert np.array_equal(snowy, np.rot90(snowy, 2))  # the flakes and the same ones turned
        assert snowy.min() >= int(base)
        shares.append((snowy[..., 0] > base + 10).mean())
    assert 0 < shares[0] < shares[1] < shares[2]


@pytest.mark.data
def test_real_brightness_and_black_pixels(real_image, rng):
    assert real_image.shape == (900, 1600, 3)
    bright = cameras.brighten(real_image, 0.3, rng)
    places = np.random.default_rng(0).integers(0, (900, 1600), (200, 2))
    for row, col in places:
        assert bright[row, col] == pytest.approx(brightened_by_hand(real_image[row, col], 0.3), abs=1)
    assert (cameras.blacken(real_image, None, rng) == 0).all(axis=2).sum() == 1_440_000


@pytest.mark.data
def test_real_darkness_blur_fog_and_snow(real_image, rng):
    dark = cameras.darken(real_image, (0.60, 25, 0.08), rng).astype(float) / 255
    low, high = real_image.min(), real_image.max()
    expected = ((real_image.astype(float) - low) / (high - low)) ** 2 * 0.6
    assert dark.mean() == pytest.approx(expected.mean(), abs=0.01)
    blurred = cameras.blur(real_image, 0.13, rng)
    assert blurred.mean() == pytest.approx(real_image.mean(), abs=1)
    assert contrast(blurred) < 0.7 * contrast(real_image)
    foggy = [contrast(weather.fog(real_image, severity, rng)) for severity in ((2, 0.0005), (4, 0.002))]
    assert contrast(real_image) > 1.8 * foggy[0] > 2 * foggy[1]
    soiled = cameras.soil(real_image, None, np.random.default_rng(4))
    mask = cameras.dirt_mask(int(np.random.default_rng(4).integers(16)))
    hidden = ((mask.mean(axis=2) / 255) ** 3 < 0.02).mean()
    unchanged = ((mask / 255) ** 3 > 0.999).all(axis=2).mean()
    assert (np.abs(soiled.astype(int) - real_image) <= 1).all(axis=2).mean() > 0.8 * unchanged
    assert (soiled.mean(axis=2) < 75).mean() > 0.8 * hidden
