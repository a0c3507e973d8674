"""The image and point pipeline against the original's, on the real frame that the golden file was made from."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.image_transforms import (
    ImageAugmentation,
    ImageDraw,
    draw_image_augmentation,
    fixed_image_draw,
    image_matrix,
    transform_image,
)
from cmt_aqr.data.readers import read_image, read_points, read_sweeps
from tests.parity.exported_cases import image_branch
from tests.parity.golden import REPOSITORY, Golden, load_golden

FLOAT64 = 1e-12
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("pipeline")


@pytest.fixture(scope="module")
def frame(golden) -> dict:
    root = Path(os.environ.get("CMT_AQR_REAL_FRAME") or REPOSITORY.parent / "shared" / "nuscenes-one")
    if not (root / "infos.json").is_file():
        pytest.skip(f"real nuScenes frame {root} does not exist (set CMT_AQR_REAL_FRAME)")
    infos = json.loads((root / "infos.json").read_text())
    paths = [root / infos["cameras"][camera]["path"] for camera in CAMERAS]
    return {
        "views": [read_image(path, size=tuple(golden["raw/shape"][:2])) for path in paths],
        "lidar": root / infos["lidar"]["path"],
    }


def _presets(golden: Golden) -> list[str]:
    return sorted(name.split("/")[0] for name in golden.names if name.endswith("/resize_crop"))


def _seeds(golden: Golden) -> list[int]:
    return sorted(int(name.split("/")[0][10:]) for name in golden.names if name.endswith("/draw"))


def _stored_draw(golden: Golden, name: str) -> ImageDraw:
    resize, width, height, *crop, flip, rotate = golden[name].tolist()
    return ImageDraw(resize, (int(width), int(height)), tuple(int(c) for c in crop), bool(flip), rotate)


def _transform(views, draw: ImageDraw) -> np.ndarray:
    left, top, right, bottom = draw.crop
    images = np.empty((len(views), bottom - top, right - left, 3), dtype=np.uint8)
    for view, out in zip(views, images, strict=True):
        transform_image(view, draw, out)
    return images


def _check_pixels(golden: Golden, prefix: str, images_bgr: np.ndarray) -> None:
    """Equal, not close: the same pixels decoded and the same integer resize."""
    assert list(images_bgr.shape[1:]) == golden[f"{prefix}/shape"].tolist()
    for v, image in enumerate(images_bgr):
        rows, cols = golden[f"{prefix}/rows"][v].astype(int), golden[f"{prefix}/cols"][v].astype(int)
        values = golden.tensor(f"{prefix}/values")[v]
        golden.check_equal("pixels after resizing and cropping", torch.from_numpy(image[rows, cols]).float(), values)
    mean = images_bgr.reshape(len(images_bgr), -1, 3).mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(mean, golden[f"{prefix}/view_mean"], rtol=FLOAT64)


def _check_matrix(golden: Golden, name: str, draw: ImageDraw) -> None:
    intrinsic = golden.tensor("cam_intrinsic_in")
    lidar2img = image_matrix(draw) @ intrinsic @ golden.tensor("lidar2cam_in")
    golden.check("lidar2img", lidar2img, name, FLOAT64)


def _image_size(golden: Golden) -> tuple[int, int]:
    return tuple(golden["raw/shape"][:2].tolist())


def _evaluation_draw(golden: Golden, preset: str) -> ImageDraw:
    if f"{preset}/cropped/shape" in golden:
        final_size = tuple(golden[f"{preset}/cropped/shape"][:2].tolist())
    else:  # pad_HxW: only the padded result is stored
        final_size = tuple(int(n) for n in preset.removeprefix("pad_").split("x"))
    return fixed_image_draw(image_size=_image_size(golden), final_size=final_size)


def _resize_range(golden: Golden) -> tuple[float, float]:
    """The range of the stored draws: each resize is low + (high - low) * the seed's first uniform number."""
    seeds = _seeds(golden)
    uniform = [np.random.RandomState(seed).uniform() for seed in seeds]
    slope, low = np.polyfit(uniform, [golden[f"train_seed{seed}/draw"][0] for seed in seeds], 1)
    return round(float(low), 6), round(float(low + slope), 6)


def test_decoded_images(golden, frame):
    for v, image in enumerate(frame["views"]):
        rows, cols = golden["raw/rows"][v].astype(int), golden["raw/cols"][v].astype(int)
        values = golden.tensor("raw/values")[v]
        golden.check_equal("decoded pixels", torch.from_numpy(image[rows, cols, ::-1].copy()).float(), values)


def test_evaluation_draws_and_matrices(golden):
    assert _presets(golden)
    for preset in _presets(golden):
        draw = _evaluation_draw(golden, preset)
        assert [*draw.size, *draw.crop] == golden[f"{preset}/resize_crop"].tolist()
        assert draw.resize == golden[f"{preset}/resize"]
        _check_matrix(golden, f"{preset}/lidar2img", draw)


def test_evaluation_pixels(golden, frame):
    for preset in _presets(golden):
        images = _transform(frame["views"], _evaluation_draw(golden, preset))
        _check_pixels(golden, f"{preset}/cropped", images[..., ::-1])


def test_normalised_pixels(golden, frame):
    """What the image branch makes of our pixels, and the golden export writes, in float64: BGR, padded with zeros."""
    branch = image_branch(load_golden("image_branch"))
    for preset in sorted(name.split("/")[0] for name in golden.names if name.endswith("/final/shape")):
        draw = _evaluation_draw(golden, preset)
        _check_matrix(golden, f"{preset}/lidar2img", draw)
        assert (golden[f"{preset}/pad_shape"] == golden[f"{preset}/final/shape"]).all()
        for v, view in enumerate(frame["views"]):
            final = branch.prepare(torch.from_numpy(_transform([view], draw)))[0].movedim(0, -1)
            assert list(final.shape) == golden[f"{preset}/final/shape"].tolist()
            rows, cols = (golden[f"{preset}/final/{axis}"][v].astype(int) for axis in ("rows", "cols"))
            stage = "pixels after normalising and padding (float32 there)"
            golden.check(stage, final[rows, cols], golden[f"{preset}/final/values"][v], FLOAT32)


def test_training_draws_and_matrices(golden):
    augmentation = ImageAugmentation(_resize_range(golden), flip=True)
    for seed in _seeds(golden):
        name = f"train_seed{seed}"
        drawn = draw_image_augmentation(
            np.random.RandomState(seed),
            image_size=_image_size(golden),
            final_size=tuple(golden[f"{name}/cropped/shape"][:2].tolist()),
            augmentation=augmentation,
        )
        stored = _stored_draw(golden, f"{name}/draw")
        assert drawn.resize == pytest.approx(stored.resize, rel=FLOAT64)
        assert replace(drawn, resize=stored.resize) == stored
        _check_matrix(golden, f"{name}/lidar2img", stored)


def test_training_pixels(golden, frame):
    for seed in _seeds(golden):
        name = f"train_seed{seed}"
        images = _transform(frame["views"], _stored_draw(golden, f"{name}/draw"))
        _check_pixels(golden, f"{name}/cropped", images[..., ::-1])


def test_key_frame_without_sweeps(golden, frame):
    """Fact 30: only the key frame remains, none of it removed, and the ring index becomes time 0."""
    points = read_sweeps(frame["lidar"], [], close_radius=1.0)
    assert len(points) == golden["points/after_multisweep_n"]
    first = golden.tensor("points/first200")
    golden.check_equal("points without sweeps", points[: len(first)], first)
    assert bool((points[:, 4] == 0).all()) == bool(golden["points/time_all_zero"])
    assert read_points(frame["lidar"])[:, 4].any()
