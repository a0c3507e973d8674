"""Decode JPEG, and find damage that shows in the bytes without decoding.

torchvision's decoder is a quarter faster than OpenCV's and gives the same pixels; its removal has been announced, so
OpenCV is the fallback. Neither reports damage in the middle of a file, after which the rest of the picture is wrong.
"""

import re
from collections.abc import Iterator

import cv2
import numpy as np
import torch

try:
    from torchvision.io import decode_jpeg
except ImportError:  # removed, as announced since torchvision 0.29
    decode_jpeg = None

# Last marker of a JPEG, and its largest distance from the end of the file (some writers pad).
END = b"\xff\xd9"
TAIL = 1024

# Inside a scan 0xff is followed by a stuffed 0 or belongs to a restart marker, which other 0xff may precede.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# A zeroed disk block is at least 512 bytes; its ends may fall outside the scan.
_ZEROS = bytes(256)
# Second byte of the markers that matter here (ITU-T T.81, table B.1).
_SEQUENTIAL = (0xC0, 0xC1)
_HUFFMAN_TABLES, _SCAN = 0xC4, 0xDA
# All markers that start a frame: C0 to CF without the tables and extensions among them.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def decode_with_torchvision(data: bytes | bytearray) -> np.ndarray | None:
    """Decode a JPEG.

    Args:
        data: the whole file.

    Returns:
        (height, width, 3) uint8 RGB, rotated as its EXIF tag demands; None when the data are not a JPEG.
    """
    if not data:
        return None
    try:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB", apply_exif_orientation=True)
    except RuntimeError:
        return None
    return image.permute(1, 2, 0).numpy()


def decode_with_opencv(data: bytes | bytearray) -> np.ndarray | None:
    """The same as :func:`decode_with_torchvision`, pixel for pixel."""
    if not data:
        return None
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


# torchvision can also have been built without its decoders.
_has_torchvision = decode_jpeg is not None and hasattr(torch.ops.image, "decode_jpeg")
decode = decode_with_torchvision if _has_torchvision else decode_with_opencv


def find_damage(data: bytes) -> str | None:
    """Damage of a JPEG, as far as it can be seen in the bytes without decoding them.

    Finds a truncated file and, in the compressed data of an ordinary (sequential, one scan) JPEG, what no encoder
    writes: a marker in the middle, which overwritten data contain by chance every few hundred bytes, and a run of
    zeros, which a lost disk block leaves. A single wrong byte or a missing piece is not found.

    Args:
        data: the whole file.

    Returns:
        The words to put after "the file", None when nothing was found.
    """
    if END not in data[-TAIL:]:
        return f"is truncated: none of its {len(data)} bytes end a JPEG, expected ff d9"
    start, zeros_mean_blank = _scan_start(data)
    if start is None:
        return None
    marker = _MARKER.search(data, start)
    end = len(data) if marker is None else marker.start()
    zeros = -1 if zeros_mean_blank else data.find(_ZEROS, start, end)
    if zeros >= 0:
        return f"is corrupt: only zeros from byte {zeros} on, in the middle of its compressed data"
    if end < len(data) - TAIL:
        return f"is corrupt: marker {marker[0].hex(' ')} at byte {end}, in the middle of its compressed data"
    return None


def stated_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in the header of a JPEG, before any rotation by its EXIF tag; None where there is no header."""
    for marker, segment, _ in _segments(data):
        if marker in _FRAMES and len(segment) >= 5:
            return int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Second byte of the marker, content and end of the segments before the first scan's data."""
    position, marker = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF and marker != _SCAN:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        position += 2 + length
        yield marker, segment, position


def _scan_start(data: bytes) -> tuple[int | None, bool]:
    """Where the compressed data of a sequential JPEG with one scan begin (else None), and whether it may be all zeros.

    Zero bits are the first code of every Huffman table. Where this code means "end of block" in the AC tables of all
    components, as in tables optimised for a flat picture, a flat area is a run of zeros. In the usual luminance table
    it is a coefficient, which no picture repeats for long.
    """
    num_components, first_symbols = 0, []
    for marker, segment, position in _segments(data):
        if marker in _SEQUENTIAL and len(segment) > 5:
            num_components = segment[5]
        elif marker == _HUFFMAN_TABLES:
            first_symbols += _first_ac_symbols(segment)
        elif marker == _SCAN:
            is_whole = bool(segment) and segment[0] == num_components
            # Low four bits: size of the coefficient that follows, 0 for the end of a block and for a run of zeros.
            return (position if is_whole else None), all(symbol & 0x0F == 0 for symbol in first_symbols)
    return None, False


def _first_ac_symbols(segment: bytes) -> list[int]:
    """The symbol of the first code of every AC table in a DHT segment (a byte of class and id, 16 counts, symbols)."""
    symbols, position = [], 0
    while position + 17 < len(segment):
        if segment[position] >> 4 == 1:
            symbols.append(segment[position + 17])
        position += 17 + sum(segment[position + 1 : position + 17])
    return symbols
