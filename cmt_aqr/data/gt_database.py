"""The database behind GT-sampling: every well-seen object of a training split, with its points and its image patch.

A folder of three files: `objects.npz` (labels, boxes, offsets), `points.bin` (float32, 5 a point, relative to the box
centre, axes of the LiDAR frame) and `patches.bin` (JPEG). The folder's name carries a digest of the index and of the
settings, so a change of either builds a new folder; it appears only when it is complete (`database_writer.py`).
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmt_aqr.boxes import box_corners, points_in_boxes
from cmt_aqr.data.cache import exclusive_lock
from cmt_aqr.data.database_writer import FrameObject, write_database
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.jpeg import decode
from cmt_aqr.data.readers import POINT_SIZE, load_points, read_views
from cmt_aqr.data.sample import DataError
from cmt_aqr.geometry import transform_points

FORMAT_VERSION = 3
# A patch with a side shorter than this is not pasted (the original's threshold, pixels).
MIN_PATCH_SIZE = 10
# Sweep points closer than this in both |x| and |y| are not part of an object, metres (the original's, *Quirk F34*).
CLOSE_RADIUS = 1.0
_JPEG_QUALITY = 95
# Cell of the coarse grid that preselects points near boxes, metres.
_GRID_CELL = 1.0


@dataclass(frozen=True)
class GtDatabase:
    """Objects of a split, ready to be pasted.

    Attributes:
        folder: of the points and patches.
        labels: (N,) int64.
        boxes: (N, 9) float32, LiDAR frame of the frame they were cut from.
        point_offsets: (N + 1,) int64, in points.
        patch_offsets: (N + 1,) int64, in bytes; an object without patch has length 0.
    """

    folder: Path
    labels: np.ndarray
    boxes: np.ndarray
    point_offsets: np.ndarray
    patch_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def points(self, index: int) -> Tensor:
        """(P, 5) float32 points of one object, at the position of its box; column 4 is the time lag."""
        row_bytes = POINT_SIZE * np.dtype(np.float32).itemsize
        start, stop = (int(offset) * row_bytes for offset in self.point_offsets[index : index + 2])
        points = torch.frombuffer(self._read("points.bin", start, stop), dtype=torch.float32).view(-1, POINT_SIZE)
        points[:, :3] += torch.from_numpy(self.boxes[index, :3])
        return points

    def patch(self, index: int) -> np.ndarray | None:
        """(h, w, 3) uint8 RGB, the object as its largest view shows it; None when no camera shows it."""
        start, stop = (int(offset) for offset in self.patch_offsets[index : index + 2])
        if start == stop:
            return None
        return decode(self._read("patches.bin", start, stop))

    def _read(self, name: str, start: int, stop: int) -> bytearray:
        # Opened for each read, so that no file handle has to be sent to a worker process.
        with open(self.folder / name, "rb") as file:
            file.seek(start)
            data = bytearray(file.read(stop - start))
        if len(data) != stop - start:
            raise DataError(f"{self.folder / name} is truncated: no {stop - start} bytes at {start}; delete the folder")
        return data


def open_gt_database(
    index: FrameIndex,
    *,
    cache_dir: str | Path,
    num_sweeps: int,
    with_patches: bool,
    min_points: int = 5,
    num_workers: int = 0,
) -> GtDatabase:
    """Open the database of a training split; where there is none, build it from the frames first.

    Safe to call from several processes: one builds, the others wait. A build that was interrupted continues.

    Args:
        index: training split.
        cache_dir: parent folder of the database.
        num_sweeps: previous sweeps added to a key frame's points, as in the training samples.
        with_patches: cut image patches too (needs the cameras).
        min_points: objects with fewer points are left out (*Source*: CMT configs, `filter_by_min_points`).
        num_workers: processes that read frames.

    Raises:
        DataError: bad sensor files, a full disk, a damaged database.
    """
    settings = {
        "format": FORMAT_VERSION,
        "index": index.content_hash,
        "num_sweeps": num_sweeps,
        "with_patches": with_patches,
        "min_points": min_points,
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = Path(cache_dir) / f"objects-{index.version}-{index.split}-{digest}"
    if not folder.is_dir():
        with exclusive_lock(folder):
            if not folder.is_dir():
                write_database(_FrameObjects(index, num_sweeps, with_patches, min_points), folder, num_workers)
    try:
        with np.load(folder / "objects.npz", allow_pickle=False) as arrays:
            return GtDatabase(folder, *(arrays[name] for name in ("labels", "boxes", "point_offsets", "patch_offsets")))
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{folder / 'objects.npz'} cannot be read: {error}; delete the folder, it is then built again"
        ) from None


def near_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Indices (C,) of points in grid cells that some box can reach: a cheap superset of the points inside boxes.

    Args:
        points: (P, >=3) LiDAR frame, metres.
        boxes: (G, 9).
    """
    if len(points) == 0 or len(boxes) == 0:
        return torch.empty(0, dtype=torch.int64)
    radius = torch.linalg.vector_norm(boxes[:, 3:5], dim=1, keepdim=True) / 2
    low, high = boxes[:, :2] - radius, boxes[:, :2] + radius
    origin = low.amin(dim=0) - _GRID_CELL
    size = ((high.amax(dim=0) - origin) / _GRID_CELL).ceil().long() + 2
    reached = torch.zeros(size.tolist(), dtype=torch.bool)
    first, last = ((low - origin) / _GRID_CELL).floor().long(), ((high - origin) / _GRID_CELL).floor().long()
    for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True):
        reached[x0 : x1 + 1, y0 : y1 + 1] = True
    # Points outside the grid land in its border cells, which no box reaches.
    cells = ((points[:, :2] - origin) / _GRID_CELL).clamp(min=torch.zeros(2), max=size - 1.0).long()
    return reached.view(-1)[cells[:, 0] * size[1] + cells[:, 1]].nonzero()[:, 0]


def points_of_boxes(points: Tensor, boxes: Tensor) -> list[Tensor]:
    """Points inside each box, as `boxes.points_in_boxes` finds them, but without a (P, G) matrix.

    Args:
        points: (P, >=3) LiDAR frame, metres.
        boxes: (G, 9).

    Returns:
        G tensors of int64 indices into `points`, ascending.
    """
    candidates = near_boxes(points, boxes)
    x, y = points[candidates, :2].unbind(dim=1)
    radius = torch.linalg.vector_norm(boxes[:, 3:5], dim=1) / 2
    inside = []
    for box, reach in zip(boxes, radius, strict=True):
        close = candidates[((x - box[0]).abs() <= reach) & ((y - box[1]).abs() <= reach)]
        inside.append(close[points_in_boxes(points[close], box[None])[:, 0]])
    return inside


def project_boxes(boxes: Tensor, lidar2img: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Image rectangles of boxes in one view.

    Args:
        boxes: (G, 9) LiDAR frame.
        lidar2img: (4, 4) float64.
        image_size: (height, width) in pixels.

    Returns:
        rectangles (G, 4) int64 x0 y0 x1 y1, clipped to the image; depth (G,) mean corner depth in metres; visible (G,)
        bool: all eight corners lie in front of the camera.
    """
    corners = transform_points(lidar2img, box_corners(boxes.double()).view(-1, 3)).view(-1, 8, 3)
    depth = corners[..., 2]
    visible = (depth > 0).all(dim=1)
    pixels = torch.where(visible[:, None, None], corners[..., :2] / depth[..., None], corners[..., :2])
    limit = torch.tensor([image_size[1] - 1, image_size[0] - 1], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    low, high = pixels.amin(dim=1).clamp(zero, limit), pixels.amax(dim=1).clamp(zero, limit)
    return torch.cat((low, high), dim=1).long(), depth.mean(dim=1), visible


class _FrameObjects(Dataset):
    """The objects of each frame as (label, box, points, JPEG bytes), or the DataError that reading it raised."""

    def __init__(self, index: FrameIndex, num_sweeps: int, with_patches: bool, min_points: int):
        self._index = index
        self._num_sweeps = num_sweeps
        self._with_patches = with_patches
        self._min_points = min_points

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int) -> list[FrameObject] | DataError:
        try:
            return list(self._objects(item))
        except DataError as error:
            return DataError(str(error))

    def _objects(self, item: int) -> Iterator[FrameObject]:
        frame, root = self._index.frame(item), self._index.dataroot
        targets = frame.targets("lidar_or_radar")
        points = load_points(frame, root, num_sweeps=self._num_sweeps, close_radius=CLOSE_RADIUS)
        inside = points_of_boxes(points, targets.boxes)
        keep = [i for i, indices in enumerate(inside) if len(indices) >= self._min_points]
        patches = [b""] * len(targets.labels)
        if self._with_patches and keep:
            lidar2img = torch.stack([camera.lidar2img() for camera in frame.cameras])
            patches = _cut_patches(targets.boxes, lidar2img, read_views(frame, root))
        for i in keep:
            own = points[inside[i]]
            own[:, :3] -= targets.boxes[i, :3]
            yield int(targets.labels[i]), targets.boxes[i].numpy(), own.numpy(), patches[i]


def _cut_patches(boxes: Tensor, lidar2img: Tensor, views: Iterable[np.ndarray]) -> list[bytes]:
    """JPEG of each box in the view that shows it largest; empty where none does."""
    best: list[tuple[int, np.ndarray | None]] = [(0, None)] * len(boxes)
    for matrix, view in zip(lidar2img, views, strict=True):
        rectangles, _, visible = project_boxes(boxes, matrix, view.shape[:2])
        for i, (x0, y0, x1, y1) in enumerate(rectangles.tolist()):
            area = (x1 - x0) * (y1 - y0)
            if visible[i] and min(x1 - x0, y1 - y0) > MIN_PATCH_SIZE and area > best[i][0]:
                best[i] = (area, view[y0:y1, x0:x1])
    return [b"" if patch is None else _encode(patch) for _, patch in best]


def _encode(patch: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(patch, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
