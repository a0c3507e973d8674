import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.data.image_transforms import (
    ImageAugmentation,
    ImageDraw,
    draw_image_augmentation,
    fixed_image_draw,
    image_matrix,
    transform_image,
)


def _dot(height: int, width: int, u: float, v: float) -> np.ndarray:
    """A soft bright dot centred at continuous pixel (u, v)."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    value = 250 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 4.0**2))
    return np.repeat(value.astype(np.uint8)[..., None], 3, axis=2)


def _centre(image: np.ndarray) -> np.ndarray:
    weight = image[..., 0].astype(float)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


DRAWS = [
    ImageDraw(0.5, (200, 112), (0, 12, 200, 112), False, 0.0),
    ImageDraw(0.5, (200, 112), (20, 12, 180, 112), True, 0.0),
    ImageDraw(1.25, (500, 281), (130, 61, 430, 241), True, 0.0),
    ImageDraw(0.4, (160, 90), (0, -10, 200, 90), True, 0.0),  # smaller than the crop: black above and at the right
    ImageDraw(0.6, (240, 135), (10, 5, 210, 135), False, 12.0),
    ImageDraw(0.6, (240, 135), (10, 5, 210, 135), True, -20.0),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_pixels_and_matrix_move_alike(draw):
    u, v = 230.0, 130.0
    left, top, right, bottom = draw.crop
    out = np.full((bottom - top, right - left, 3), 77, dtype=np.uint8)
    transform_image(_dot(225, 400, u, v), draw, out)
    expected = image_matrix(draw) @ torch.tensor([3 * u, 3 * v, 3, 1], dtype=torch.float64)
    # The resized image has whole pixels, the matrix the whole factor (up to one pixel over the image), and OpenCV turns
    # about pixel corners, the matrix about pixel centres (half a pixel): both as in the original.
    tolerance = 0.35 if draw.rotate == 0 else 0.8
    np.testing.assert_allclose(_centre(out), expected[:2] / expected[2], atol=tolerance)
    assert expected[2:].tolist() == [3, 1]


def test_outside_of_the_image_is_black():
    image = np.full((10, 20, 3), (1, 2, 3), dtype=np.uint8)
    out = np.full((12, 20, 3), 77, dtype=np.uint8)
    transform_image(image, ImageDraw(1.0, (20, 10), (5, -2, 25, 10), True, 0.0), out)
    assert (out[2:, 5:] == (1, 2, 3)).all()
    assert not out[:2].any() and not out[:, :5].any()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotate", [0.0, 7.0])
@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((100, 60), (0, 28, 100, 60)),
        ((100, 60), (13, 5, 90, 41)),
        ((100, 60), (-3, 28, 97, 60)),
        ((100, 60), (30, 20, 130, 70)),
        ((99, 60), (0, 28, 99, 60)),
        ((100, 59), (0, 28, 100, 59)),
        ((200, 120), (13, 70, 173, 120)),
    ],
)
def test_pixels_are_those_of_the_whole_image_resized(size, crop, flip, rotate):
    image = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    left, top, right, bottom = crop
    expected = np.zeros((bottom - top, right - left, 3), dtype=np.uint8)
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)[max(top, 0) : bottom, max(left, 0) : right]
    expected[max(-top, 0) :, max(-left, 0) :][: resized.shape[0], : resized.shape[1]] = resized
    if flip:
        expected = np.ascontiguousarray(expected[:, ::-1])
    if rotate:
        centre = ((right - left) / 2, (bottom - top) / 2)
        turn = cv2.getRotationMatrix2D(centre, rotate, scale=1.0)
        expected = cv2.warpAffine(expected, turn, (right - left, bottom - top))
    images = np.full((3, *expected.shape), 77, dtype=np.uint8)
    untouched = image.copy()
    transform_image(image, ImageDraw(size[0] / 200, size, crop, flip, rotate), images[1])
    np.testing.assert_array_equal(images[1], expected)
    assert (images[[0, 2]] == 77).all() and (image == untouched).all()


def test_fixed_draw_keeps_bottom_and_middle():
    wide = fixed_image_draw(image_size=(900, 1600), final_size=(320, 800))
    assert wide == ImageDraw(0.5, (800, 450), (0, 130, 800, 450), False, 0.0)
    tall = fixed_image_draw(image_size=(100, 100), final_size=(200, 100))
    assert tall == ImageDraw(2.0, (200, 200), (50, 0, 150, 200), False, 0.0)


def test_draws_stay_in_their_ranges():
    rng = np.random.default_rng(0)
    ranges = ImageAugmentation((0.47, 0.625), (0.0, 0.2), (-5.0, 5.0), flip=True)
    draws = [
        draw_image_augmentation(rng, image_size=(900, 1600), final_size=(320, 800), augmentation=ranges)
        for _ in range(300)
    ]
    resize = np.array([draw.resize for draw in draws])
    assert resize.min() < 0.475 and resize.max() > 0.62 and ((resize >= 0.47) & (resize <= 0.625)).all()
    assert all(draw.size == (int(1600 * draw.resize), int(900 * draw.resize)) for draw in draws)
    assert all(draw.crop[2] - draw.crop[0] == 800 and draw.crop[3] - draw.crop[1] == 320 for draw in draws)
    assert all(0.8 * draw.size[1] - 1 <= draw.crop[3] <= draw.size[1] for draw in draws)
    assert 100 < sum(draw.flip for draw in draws) < 200
    assert max(draw.rotate for draw in draws) > 4
    still = ImageAugmentation((0.5, 0.5), flip=False)
    draw = draw_image_augmentation(rng, image_size=(900, 1600), final_size=(320, 800), augmentation=still)
    assert draw == fixed_image_draw(image_size=(900, 1600), final_size=(320, 800))
