"""Checksums of whole files: one byte that changes anywhere is found when the file is read.

``torch.save`` writes a zip file with a CRC for each record, but ``torch.load`` does not compare them, and nothing
protects headers and padding. Here the zip comment at the end of the file is ``cmt_aqr sha256 <64 digits>``, the
SHA-256 of every byte before it. Programs that read zip files, ``torch.load`` included, ignore the comment, and a copy
of the file keeps it. A safetensors file carries in its metadata the SHA-256 of the file with 64 zeros in its place.
"""

import hashlib
import json
import struct
import zipfile
from typing import BinaryIO

MARK = b"cmt_aqr sha256 "
COMMENT_SIZE = len(MARK) + 64
# The end record of a zip file without a comment: its signature, 16 bytes of numbers, the length of the comment.
END_SIGNATURE = b"PK\x05\x06"
END_SIZE = 22
CHUNK = 1 << 20
# Metadata of a safetensors file with a checksum. Two keys: where only one is left, the file is damaged.
METADATA = {"checksum": "sha256", "sha256": 64 * "0"}


class ChecksumWriter:
    """Passes a zip file on to ``file`` and computes the checksum on the way.

    Attributes:
        error: the first error of the operating system; ``torch.save`` reports a full disk as an error of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file
        self._digest = hashlib.sha256()
        self._held_back = b""  # at most END_SIZE bytes, because finish() changes the end record

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last bytes; called by ``torch.save``."""
        view = memoryview(data).cast("B")
        if len(view) < END_SIZE:
            view = memoryview(self._held_back + bytes(view))
        else:
            self._emit(self._held_back)
        split = max(len(view) - END_SIZE, 0)
        self._emit(view[:split])
        self._held_back = bytes(view[split:])
        return len(data)

    def flush(self) -> None:
        """Flush the file; called by ``torch.save``."""
        self._file.flush()

    def finish(self) -> None:
        """Write the end record and the comment.

        Raises:
            OSError: the disk is full.
        """
        end = self._held_back
        assert end.startswith(END_SIGNATURE) and end.endswith(b"\0\0"), "torch.save ends with an empty zip comment"
        self._emit(end[:-2] + struct.pack("<H", COMMENT_SIZE))
        self._file.write(MARK + self._digest.hexdigest().encode())
        self._file.flush()

    def _emit(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def has_checksum(file: BinaryIO) -> bool:
    """Whether a file ends with a checksum; where it does, the checksum is compared with the content.

    Raises:
        ValueError: the content does not have this checksum.
    """
    size = file.seek(0, 2)
    file.seek(max(size - COMMENT_SIZE, 0))
    comment = file.read(COMMENT_SIZE)
    if not comment.startswith(MARK):
        return False
    file.seek(0)
    _compare(_sha256(file, size - COMMENT_SIZE), comment[len(MARK) :])
    return True


def check_records(file: BinaryIO) -> None:
    """Compare the CRC of every record of a zip file: all that a file without a checksum offers.

    Raises:
        ValueError: a record is damaged, or the zip directory at the end is.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception:  # zipfile reports damage as one of about ten classes
        raise ValueError("the zip directory at its end cannot be read") from None
    if damaged is not None:
        raise ValueError(f"the record {damaged!r} does not have its CRC")


def add_checksum(content: bytes) -> bytes:
    """A safetensors file whose metadata include METADATA -> the same file with its checksum."""
    before, zeros = b'"sha256":"', METADATA["sha256"].encode()
    assert content.count(before + zeros) == 1, "the metadata include METADATA"
    return content.replace(before + zeros, before + hashlib.sha256(content).hexdigest().encode())


def check_safetensors(file: BinaryIO) -> None:
    """Compare the checksum of a safetensors file, if it has one.

    Raises:
        ValueError: the header cannot be read, or the content does not have this checksum.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"its header has {length} bytes, the file {size}")
    header = file.read(length)
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise ValueError("its header cannot be read") from None
    found = METADATA.keys() & metadata.keys()
    if not found:
        return
    stored = metadata.get("sha256", "").encode()
    if len(found) < len(METADATA) or metadata["checksum"] != METADATA["checksum"] or header.count(stored) != 1:
        raise ValueError("its checksum cannot be read")
    start = length.to_bytes(8, "little") + header.replace(stored, METADATA["sha256"].encode())
    _compare(_sha256(file, size, start), stored)


def _sha256(file: BinaryIO, size: int, start: bytes = b"") -> str:
    """Of ``start`` and at most ``size`` bytes from here on."""
    digest = hashlib.sha256(start)
    while size > 0 and (data := file.read(min(CHUNK, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def _compare(actual: str, stored: bytes) -> None:
    if actual.encode() != stored:
        expected = ascii(stored[:8].decode("latin-1"))[1:-1]
        raise ValueError(f"its checksum says SHA-256 {expected}..., its content has {actual[:8]}...")
