"""The index: everything a split's samples need from the nuScenes tables, in one file that opens fast.

The file: a zlib stream of JSON for each frame, in the order of the frames; then one of the header (format, settings,
fingerprint of the tables, tokens and classes of the frames, where each begins); then 16 bytes, the header's offset and
a signature. Frames are written one by one and read on demand, so neither needs memory for all of them.

The fingerprint holds size, time stamp and SHA-256 of every table that was read. Equal sizes and time stamps are
trusted; where a time stamp differs, the table is hashed; where the hash differs, the index is rebuilt.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, get_args

import torch
from torch import Tensor

from cmt_aqr.box_format import BOX_SIZE, BoxChoice
from cmt_aqr.boxes import Targets
from cmt_aqr.data.cache import exclusive_lock, fingerprint, new_cache, same_content
from cmt_aqr.data.sample import DataError
from cmt_aqr.progress import phase

# To be increased whenever the meaning or layout of the file changes; older files are then rebuilt.
FORMAT_VERSION = 3
# The last bytes of a file: where the header begins, and what kind of file it is.
_END = struct.Struct("<Q8s")
_MARK = b"CMTINDEX"
_COMPRESSION = 4


@dataclass(frozen=True)
class SweepRecord:
    """A previous LiDAR sweep: file relative to the data root, time lag (s, > 0), sweep2key (4, 4) nested list."""

    file: str
    time_lag: float
    sweep2key: list[list[float]]


@dataclass(frozen=True)
class CameraRecord:
    """One view: file relative to the data root (None: the frame has no such image), pixels, calibration.

    Attributes:
        channel: nuScenes channel, such as CAM_FRONT.
        file: JPEG or None.
        height: of the image on disk.
        width: of the image on disk.
        intrinsic: (3, 3) nested list, pixels.
        lidar2cam: (4, 4) nested list; includes the ego motion between the LiDAR's and the camera's time stamp.
    """

    channel: str
    file: str | None
    height: int
    width: int
    intrinsic: list[list[float]]
    lidar2cam: list[list[float]]

    def lidar2img(self) -> Tensor:
        """(4, 4) float64, LiDAR frame -> pixels on disk, [u*d, v*d, d, 1]."""
        full = torch.eye(4, dtype=torch.float64)
        full[:3, :3] = torch.tensor(self.intrinsic, dtype=torch.float64)
        return full @ torch.tensor(self.lidar2cam, dtype=torch.float64)


@dataclass(frozen=True)
class Frame:
    """One key frame as the index stores it; lengths in metres, boxes in the LiDAR frame of the key frame.

    Attributes:
        token: sample token.
        scene: scene name.
        timestamp: microseconds.
        lidar_file: key frame's LiDAR file, relative to the data root.
        lidar2ego: (4, 4) nested list.
        ego2global: (4, 4) nested list, at the LiDAR's time stamp.
        sweeps: previous sweeps, most recent first; empty at the start of a scene.
        cameras: one record a view, in the index's order.
        boxes: G rows of 9; velocities are None where unknown.
        labels: G class labels.
        num_lidar_points: G counts from the tables (key frame only).
        num_radar_points: G counts.
        annotations: G annotation tokens.
    """

    token: str
    scene: str
    timestamp: int
    lidar_file: str
    lidar2ego: list[list[float]]
    ego2global: list[list[float]]
    sweeps: list[SweepRecord]
    cameras: list[CameraRecord]
    boxes: list[list[float | None]]
    labels: list[int]
    num_lidar_points: list[int]
    num_radar_points: list[int]
    annotations: list[str]

    def chosen(self, choice: BoxChoice) -> Tensor:
        """(G,) bool: which boxes a choice selects.

        *Source*: mmdet3d `NuScenesDataset.get_ann_info`: `lidar` is its mask without `use_valid_flag`,
        `lidar_or_radar` the one with it (`valid_flag`). *Quirk F33*.
        """
        counts = torch.tensor(self.num_lidar_points, dtype=torch.int64)
        if choice == "all":
            return torch.ones(len(counts), dtype=torch.bool)
        if choice == "lidar_or_radar":
            counts = counts + torch.tensor(self.num_radar_points, dtype=torch.int64)
        return counts > 0

    def targets(self, choice: BoxChoice) -> Targets:
        """Ground truth of the chosen boxes, unknown velocities as NaN."""
        rows = [[float("nan") if value is None else value for value in box] for box in self.boxes]
        boxes = torch.tensor(rows, dtype=torch.float32).view(-1, BOX_SIZE)
        labels = torch.tensor(self.labels, dtype=torch.int64)
        keep = self.chosen(choice)
        return Targets(boxes[keep], labels[keep])

    @staticmethod
    def from_json(text: str | bytes) -> "Frame":
        """Inverse of :meth:`to_json`."""
        row = json.loads(text)
        row["sweeps"] = [SweepRecord(**sweep) for sweep in row["sweeps"]]
        row["cameras"] = [CameraRecord(**camera) for camera in row["cameras"]]
        return Frame(**row)

    def to_json(self) -> str:
        """One line of JSON; floats survive exactly."""
        # `dataclasses.asdict` would copy every number, which takes longer than everything else in building an index.
        row = vars(self) | {"sweeps": list(map(vars, self.sweeps)), "cameras": list(map(vars, self.cameras))}
        return json.dumps(row, separators=(",", ":"), allow_nan=False)


class FrameIndex:
    """All frames of one split, in the order of the tables.

    Attributes:
        dataroot: folder that the file names are relative to.
        version: nuScenes version, such as v1.0-trainval.
        split: split name.
        cameras: channels, in the order of the views.
        max_sweeps: previous sweeps that a frame can have at most.
        tokens: sample tokens.
        path: the index file.
        content_hash: digest of the settings and of the tables' content.
    """

    def __init__(self, *, dataroot: Path, header: Mapping, path: Path):
        self.dataroot = dataroot
        self.version: str = header["settings"]["version"]
        self.split: str = header["settings"]["split"]
        self.cameras: tuple[str, ...] = tuple(header["settings"]["cameras"])
        self.max_sweeps: int = header["settings"]["max_sweeps"]
        self.tokens: list[str] = header["tokens"]
        self._frame_labels: dict[str, list[list[int]]] = header["frame_labels"]
        self.path = path
        contents = [header["settings"], {name: mark[2] for name, mark in sorted(header["tables"].items())}]
        self.content_hash = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        self._offsets: list[int] = header["places"]

    def __len__(self) -> int:
        return len(self.tokens)

    def frame_labels(self, choice: BoxChoice) -> list[list[int]]:
        """For every frame the set of labels among the chosen boxes, sorted (for class balancing)."""
        return self._frame_labels[choice]

    def frame(self, index: int) -> Frame:
        """Frame `index` in [0, len).

        Raises:
            DataError: the file was damaged or removed after it was opened.
            IndexError: no such frame.
        """
        index = range(len(self))[index]
        first, end = self._offsets[index : index + 2]
        try:
            # Opened anew each time: no file handle has to be sent to a worker process.
            with open(self.path, "rb") as file:
                file.seek(first)
                return Frame.from_json(zlib.decompress(file.read(end - first)))
        except (OSError, zlib.error, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.path}: frame {index}, {self.tokens[index]}, cannot be read: {error}; delete the file, it is "
                f"then built again"
            ) from None


def open_index(
    path: Path,
    *,
    dataroot: Path,
    settings: Mapping,
    tables: Mapping[str, Path],
    build: Callable[[], Iterable[Frame]],
) -> FrameIndex:
    """Read an index file, building it first where it is missing, stale, of another format or damaged.

    Safe to call from several processes: one builds, the others wait for it. The file is replaced atomically.

    Args:
        path: index file.
        dataroot: folder that the frames' file names are relative to.
        settings: JSON values that the frames depend on; at least version, split, cameras and max_sweeps.
        tables: name -> file of every table that the frames depend on.
        build: makes the frames.

    Raises:
        DataError: from `build`, or when it yields no frame.
    """
    index, _ = _read_if_fresh(path, dataroot, settings, tables)
    if index is not None:
        return index
    with exclusive_lock(path):
        index, reason = _read_if_fresh(path, dataroot, settings, tables)
        if index is not None:
            return index
        with phase(f"building index {path} ({reason})"), new_cache(path) as temporary, open(temporary, "wb") as file:
            with phase(f"computing the checksums of the {len(tables)} tables"):
                header = {"format": FORMAT_VERSION, "settings": settings, "tables": fingerprint(tables)}
            header |= _write_frames(file, build())
            content = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), _COMPRESSION)
            file.write(content + _END.pack(header["places"][-1], _MARK))
    return FrameIndex(dataroot=dataroot, header=header, path=path)


def _write_frames(file: BinaryIO, frames: Iterable[Frame]) -> dict:
    """Write frames one after the other; returns their part of the header."""
    tokens, offsets = [], [0]
    labels: dict[str, list[list[int]]] = {choice: [] for choice in get_args(BoxChoice)}
    for frame in frames:
        offsets.append(offsets[-1] + file.write(zlib.compress(frame.to_json().encode(), _COMPRESSION)))
        tokens.append(frame.token)
        for choice, found in labels.items():
            is_chosen = frame.chosen(choice).tolist()
            found.append(sorted({label for label, keep in zip(frame.labels, is_chosen, strict=True) if keep}))
    return {"tokens": tokens, "places": offsets, "frame_labels": labels}


def _read_header(path: Path) -> dict:
    """The header of an index file.

    Raises:
        ValueError: the file is not an index file, or damaged.
    """
    with open(path, "rb") as file:
        end = file.seek(0, 2) - _END.size
        file.seek(max(end, 0))
        try:
            offset, mark = _END.unpack(file.read())
        except struct.error:
            mark = b""
        if mark != _MARK:
            raise ValueError("its end is missing")
        file.seek(offset)
        header = json.loads(zlib.decompress(file.read(end - offset)))
    if not header["places"][-1] == offset or len(header["places"]) != len(header["tokens"]) + 1:
        raise ValueError("its header does not fit its frames")
    return header


def _read_if_fresh(
    path: Path, dataroot: Path, settings: Mapping, tables: Mapping[str, Path]
) -> tuple[FrameIndex | None, str]:
    """The index, or None and why it cannot be used."""
    if not path.exists():
        return None, "none yet"
    try:
        header = _read_header(path)
        if header["format"] != FORMAT_VERSION:
            return None, f"its format is {header['format']}, expected {FORMAT_VERSION}"
        if header["settings"] != settings:
            return None, "its settings differ"
        if not same_content(header["tables"], marks := fingerprint(tables, previous=header["tables"])):
            changed = [name for name in marks if marks[name][2] != header["tables"].get(name, (0, 0, ""))[2]]
            return None, f"tables changed: {', '.join(changed) or 'one is gone'}"
    except (OSError, zlib.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return None, f"it is damaged: {error}"
    return FrameIndex(dataroot=dataroot, header=header, path=path), ""
