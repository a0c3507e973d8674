import importlib.util
import struct
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.data import jpeg
from cmt_aqr.data.readers import read_image
from cmt_aqr.data.sample import DataError

SIZE = (301, 403)


def _picture(channels: int = 3) -> np.ndarray:
    """Edges, ramps and noise: what upsampling of colour and rounding could get wrong."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    ramp = np.stack((rows % 256, columns % 256, (rows + columns) // 3 % 256), axis=2)
    picture = np.where((rows // 40 + columns // 40)[..., None] % 2, ramp, rng.integers(0, 256, (*SIZE, 3)))
    return picture.astype(np.uint8)[..., :channels].squeeze()


def _encode(picture: np.ndarray, **options: int) -> bytes:
    flags = [number for name, value in options.items() for number in (getattr(cv2, f"IMWRITE_JPEG_{name}"), value)]
    return cv2.imencode(".jpg", picture, flags)[1].tobytes()


def _turned(data: bytes, orientation: int) -> bytes:
    """With an EXIF segment that holds the orientation alone."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


SOUND = {
    "usual": _encode(_picture()),
    "coarse": _encode(_picture(), QUALITY=20),
    "colour at full size": _encode(_picture(), SAMPLING_FACTOR=cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    "progressive": _encode(_picture(), PROGRESSIVE=1),
    "restart markers": _encode(_picture(), RST_INTERVAL=4),
    "grey": _encode(_picture(channels=1)),
    "turned": _turned(_encode(_picture()), 6),
    "padded": _encode(_picture()) + bytes(500),
}


@pytest.mark.parametrize("name", SOUND)
def test_both_decoders_give_the_same_pixels(name):
    if jpeg.decode is jpeg.decode_with_opencv:
        pytest.skip("this torchvision has no JPEG decoder")
    image = jpeg.decode_with_torchvision(SOUND[name])
    assert image.dtype == np.uint8 and image.shape == ((403, 301, 3) if name == "turned" else (301, 403, 3))
    np.testing.assert_array_equal(image, jpeg.decode_with_opencv(SOUND[name]))


@pytest.mark.parametrize("decode", [jpeg.decode, jpeg.decode_with_opencv])
def test_decoded_images_are_rgb_and_can_be_written(decode):
    image = decode(_encode(np.full((32, 48, 3), (20, 100, 220), dtype=np.uint8)))
    assert np.abs(image.astype(int) - (220, 100, 20)).max() < 4
    image[:4] = 0
    assert not image[:4].any() and image[4:].any()
    for nothing in (b"", b"no JPEG at all", b"\xff\xd8\xff\xd9", cv2.imencode(".png", image)[1].tobytes()[:50]):
        assert decode(nothing) is None


def _loaded_anew():
    spec = importlib.util.spec_from_file_location("jpeg_again", jpeg.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_opencv_stands_in_for_a_torchvision_without_decoder(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.io", None)
        removed = _loaded_anew()
    assert removed.decode is removed.decode_with_opencv
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "image", SimpleNamespace())
        not_built_in = _loaded_anew()
    assert not_built_in.decode is not_built_in.decode_with_opencv
    np.testing.assert_array_equal(removed.decode(SOUND["usual"]), jpeg.decode(SOUND["usual"]))


def test_sound_files_are_not_called_damaged():
    assert {name: jpeg.find_damage(data) for name, data in SOUND.items()} == dict.fromkeys(SOUND)
    # The compressed data of a flat picture with tables of its own are zeros.
    flat = _encode(np.full((900, 1600, 3), 128, dtype=np.uint8), OPTIMIZE=1)
    assert flat.count(bytes(512)) > 3 and jpeg.find_damage(flat) is None
    assert jpeg.find_damage(_encode(np.full((900, 1600, 3), 128, dtype=np.uint8))) is None


def _overwritten(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def test_damage_in_the_middle_is_found(tmp_path):
    usual = SOUND["usual"]
    middle = len(usual) // 2
    noise = np.random.default_rng(1).bytes(2000)
    damaged = {
        "is corrupt: only zeros from byte": _overwritten(usual, middle // 512 * 512, bytes(512)),
        f"is corrupt: marker ff 3c at byte {middle}, in the middle": _overwritten(usual, middle, b"\xff\x3c"),
        "is corrupt: marker ff": _overwritten(usual, middle, noise),
        f"is corrupt: marker ff d9 at byte {middle}": _overwritten(usual, middle, jpeg.END),
        f"is truncated: none of its {middle} bytes end a JPEG, expected ff d9": usual[:middle],
    }
    path = tmp_path / "CAM_FRONT.jpg"
    path.write_bytes(usual)
    assert read_image(path, size=SIZE).shape == (*SIZE, 3)
    for words, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            read_image(path, size=SIZE)
        assert str(caught.value).startswith(f"image file {path} {words}") and "\n" not in str(caught.value)


def test_cut_headers_do_not_break_the_search():
    for data in (SOUND["usual"], SOUND["turned"], SOUND["progressive"]):
        for length in range(700):
            jpeg.find_damage(data[:length] + jpeg.END)
            jpeg.find_damage(_overwritten(data, length, b"\xff\xff\0\0"))
