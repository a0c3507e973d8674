"""Inference at fixed sizes: images and points in, boxes out, without a host wait before the boxes are read.

    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=1)
    detections = pipeline(images, points, lidar2img)        # what `Batch` holds, on the CPU

Four stages, each one graph of torch.compile and, on a GPU, one CUDA graph:

    images    uint8 images -> camera maps                     on a stream of its own
    points    padded points -> voxels -> BEV map              on a stream of its own
    geometry  calibration -> positions, queries, windows      only when the calibration has changed
    boxes     maps, geometry -> tokens, decoder, heads, best boxes

Sizes that depend on values (points, voxels, active cells of the sparse levels) are kept with room to spare. A frame
that needs more is noticed before its boxes are returned: the sizes grow, which is logged, and it is computed again.

Shape letters: B batch, V views, P points, F features of a point, N boxes, K tokens.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cmt_aqr.attention import QueryWindows, TokenLayout
from cmt_aqr.boxes import Detections
from cmt_aqr.cameras import Cameras
from cmt_aqr.evaluation.postprocess import Decoding, class_tables, find_best
from cmt_aqr.found import Found, find_kept, pack
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.fixed_lidar import encode_points_fixed, measure_sizes
from cmt_aqr.models.folding import fold_batch_norm
from cmt_aqr.models.sparse import Capacities
from cmt_aqr.models.voxels import pad_points
from cmt_aqr.tokens import Geometry

STAGE_NAMES = ("images", "points", "geometry", "boxes")
POINT_FEATURES = 5
# Rows for points come in multiples of this, with this much room.
POINT_STEP, HEAD_ROOM = 4096, 1.25
# Calls before a CUDA graph is captured: libraries set themselves up in the first ones.
WARM_UP = 3
# Every pipeline and every growth of a size compiles the same functions anew; torch gives up after 8 by default.
MAX_COMPILATIONS = 64

logger = logging.getLogger(__name__)


class Stage:
    """A function of tensors at fixed addresses: called as it is, compiled, or replayed from a CUDA graph.

    Args:
        function: of tensors, dataclasses of tensors and constants.
        backend: of torch.compile; None: the function is called as it is.
        stream: where it runs; None on a CPU.
        captures: keep a CUDA graph of the first call, so that every later one needs the same tensors as inputs, with
            other contents, and writes its result where the first one did.
    """

    def __init__(
        self, function: Callable, *, backend: str | None, stream: torch.cuda.Stream | None, captures: bool
    ) -> None:
        self._function = function
        if backend is not None:
            self._function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        self._captures = captures
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False
        self.stream = stream
        self.outputs = None

    @property
    def is_captured(self) -> bool:
        """Whether `run` replays a CUDA graph, whatever its inputs."""
        return self._graph is not None

    def on_stream(self):
        """Context in which the inputs of the stage are written and it runs."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def run(self, *inputs) -> None:
        """Compute `outputs`, on the current stream."""
        if self._graph is not None:
            self._graph.replay()
        elif self._is_warm:
            self.outputs = self._function(*inputs)
        else:
            with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
                self._first_run(inputs)
            self._is_warm = True

    def _first_run(self, inputs: tuple) -> None:
        self.outputs = self._function(*inputs)
        if not self._captures:
            return
        for _ in range(WARM_UP - 1):
            self._function(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread that pins memory may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self._function(*inputs)
        graph.replay()
        self._graph = graph


class InferencePipeline:
    """A detector as it is used: called with the tensors of a batch (`data.sample.Batch`), it returns its detections.

    It holds a copy of the detector in eval mode with batch norms folded, so later changes of the detector's weights do
    not reach it. All calls run at one batch size: a smaller batch is filled up, and only its own frames are returned.
    The first call compiles (a minute or more), captures and measures sizes; so does a call with images of another size.

    Args:
        detector: with its weights, on the device where it shall run.
        decoding: how predictions become detections.
        batch_size: B of every call, or more.
        precision: dtype of autocast, as `evaluation.precision`; float32 switches it off.
        compiled: compile the stages, and capture them on a GPU; False: the same stages in eager mode.
        backend: of torch.compile, for tests.

    Raises:
        ValueError: a detector whose LiDAR branch aliases voxels, which only spconv can do.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        decoding: Decoding,
        batch_size: int,
        precision: torch.dtype = torch.float32,
        compiled: bool = True,
        backend: str = "inductor",
    ) -> None:
        branch = detector.lidar_branch
        if branch is not None and branch.encoder.out_of_range == "alias":
            raise ValueError("fixed sizes need out_of_range='drop', the detector's LiDAR branch has 'alias'")
        self.detector = fold_batch_norm(detector)
        self.device = detector.reference_points.weight.device
        self.decoding = decoding
        self.batch_size = batch_size
        self.precision = precision
        self._backend = backend if compiled else None
        self._captures = compiled and self.device.type == "cuda"
        self._tables = class_tables(detector.head.classes, self.device)
        self._images: Tensor | None = None
        self._points: Tensor | None = None
        self._capacities: Capacities | None = None
        self._calibration: Tensor | None = None
        self._cameras: Cameras | None = None
        self._host: tuple[Tensor, Tensor | None] | None = None
        self._streams: list[torch.cuda.Stream | None] = [None, None, None]
        self._event = None
        if self.device.type == "cuda":
            _use_channels_last(self.detector)
            self._streams = [torch.cuda.Stream(self.device) for _ in range(3)]
            self._event = torch.cuda.Event()
        self._make_stages()

    @torch.inference_mode()
    def __call__(
        self, images: Tensor | None, points: Sequence[Tensor] | None, lidar2img: Tensor | None
    ) -> list[Detections]:
        """Detect.

        Args:
            images: (B, V, H, W, 3) uint8 RGB; ignored by a detector without cameras.
            points: per frame (P_i, 5) float32 x, y, z (metres, LiDAR frame), intensity, time lag; may be empty; ignored
                by a detector without LiDAR.
            lidar2img: (B, V, 4, 4) float64 on the CPU, LiDAR frame -> pixels of the images.

        Returns:
            One record a frame, on the CPU, best first.

        Raises:
            ValueError: inputs that are missing, do not fit each other or are more than `batch_size`.
        """
        self.launch(images, points, lidar2img)
        return [found.detections for found in self.read()]

    @torch.inference_mode()
    def launch(self, images: Tensor | None, points: Sequence[Tensor] | None, lidar2img: Tensor | None) -> None:
        """The first half of a call: nothing waits for the GPU, given page-locked inputs and sizes that are known.

        Inputs must stay as they are until :meth:`read`.
        """
        images = None if self.detector.image_branch is None else images
        points = None if self.detector.lidar_branch is None else points
        self._num_frames = self._check(images, points, lidar2img)
        self._reserve(images, points)
        self._run(images, points, lidar2img)

    @torch.inference_mode()
    def read(self) -> list[Found]:
        """The second half: waits for the boxes of the last `launch`; one record a frame."""
        self._wait()
        if self._capacities is not None and not self._fits():
            self._capacities.hold(torch.tensor(measure_sizes(self.detector.lidar_branch, self._points)))
            self._make_stages()
            self._run(None, None, None)
            self._wait()
        return find_kept(self._host[0][: self._num_frames].clone())

    @property
    def windows(self) -> QueryWindows | None:
        """Windows of all matching queries under the calibration of the last `launch`; None without AQR."""
        return self._stages[2].outputs.windows

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in their order: images, points, geometry, boxes; those of missing sensors never run."""
        return dict(zip(STAGE_NAMES, self._stages, strict=True))

    def _check(self, images: Tensor | None, points: Sequence[Tensor] | None, lidar2img: Tensor | None) -> int:
        """Raise ValueError for inputs that do not fit; returns the number of frames."""
        counts = {}
        if self.detector.image_branch is not None:
            if images is None or images.ndim != 5 or images.shape[-1] != 3 or images.dtype != torch.uint8:
                got = "None" if images is None else f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"images must be uint8 of shape (B, V, H, W, 3), got {got}")
            expected = (*images.shape[:2], 4, 4)
            if lidar2img is None or tuple(lidar2img.shape) != expected:
                got = "None" if lidar2img is None else tuple(lidar2img.shape)
                raise ValueError(f"lidar2img must have shape {expected} to match the images, got {got}")
            if not lidar2img.isfinite().all():
                raise ValueError("lidar2img holds values that are not finite")
            counts["images"] = len(images)
        if self.detector.lidar_branch is not None:
            if points is None or any(cloud.ndim != 2 or cloud.shape[1] != POINT_FEATURES for cloud in points):
                got = "None" if points is None else [tuple(cloud.shape) for cloud in points]
                raise ValueError(f"points must be a list of tensors (P, {POINT_FEATURES}), got {got}")
            counts["points"] = len(points)
        sizes = set(counts.values())
        if len(sizes) != 1 or not 1 <= min(sizes) <= self.batch_size:
            raise ValueError(f"the pipeline takes 1 to {self.batch_size} frames of every sensor, got {counts}")
        return sizes.pop()

    def _reserve(self, images: Tensor | None, points: Sequence[Tensor] | None) -> None:
        """Allocate memory for the inputs, where there is none or too little."""
        if images is not None and (self._images is None or self._images.shape[1:] != images.shape[1:]):
            self._images = torch.zeros(self.batch_size, *images.shape[1:], dtype=torch.uint8, device=self.device)
            self._calibration = None
            self._make_stages()
        if points is None:
            return
        longest = max(len(cloud) for cloud in points)
        if self._points is not None and longest <= self._points.shape[1]:
            return
        rows = POINT_STEP * math.ceil(max(1, longest) * HEAD_ROOM / POINT_STEP)
        if self._points is not None:
            logger.warning(
                "inference: a frame has %d points, more than the %d rows kept for them; now %d",
                longest, self._points.shape[1], rows,
            )  # fmt: skip
        self._points = torch.empty(self.batch_size, rows, POINT_FEATURES, dtype=points[0].dtype, device=self.device)
        self._make_stages()
        if self._capacities is None:
            pad_points(points, self._points)
            self._capacities = Capacities(measure_sizes(self.detector.lidar_branch, self._points))

    def _make_stages(self) -> None:
        """Fresh stages: the first run of each compiles and captures."""
        functions = (self._encode_images, self._encode_points, self._compute_geometry, self._find_boxes)
        streams = (*self._streams, self._streams[2])
        self._stages = [
            Stage(function, backend=self._backend, stream=stream, captures=self._captures)
            for function, stream in zip(functions, streams, strict=True)
        ]
        self._has_geometry = False

    def _run(self, images: Tensor | None, points: Sequence[Tensor] | None, lidar2img: Tensor | None) -> None:
        """Enqueue everything; inputs that are None are where they were."""
        image_stage, point_stage, place_stage, box_stage = self._stages
        is_reduced = self.precision != torch.float32
        # No cache of weights that are cast already: it would outlive the memory of a CUDA graph.
        with torch.autocast(self.device.type, dtype=self.precision, enabled=is_reduced, cache_enabled=False):
            self._fork()
            with image_stage.on_stream():
                if images is not None:
                    self._images[: len(images)].copy_(images, non_blocking=True)
                if self._images is not None:
                    image_stage.run(self._images)
            with point_stage.on_stream():
                if points is not None:
                    pad_points(points, self._points)
                if self._points is not None:
                    point_stage.run(self._points, self._capacities.rows)
            pv_maps = image_stage.outputs
            bev_map, counts = point_stage.outputs or (None, None)
            with place_stage.on_stream():
                if self._images is not None and lidar2img is not None:
                    self._calibrate(lidar2img)
                if not self._has_geometry:
                    place_stage.run(self.detector.make_layout(bev_map, pv_maps), self._cameras)
                    self._has_geometry = True
                self._join()
                box_stage.run(bev_map, pv_maps, place_stage.outputs)
                self._send(box_stage.outputs, counts)

    def _fork(self) -> None:
        """All streams begin where the caller's and the last call's boxes are."""
        if self._event is not None:
            box_stream = self._streams[2]
            box_stream.wait_stream(torch.cuda.current_stream(self.device))
            for stream in self._streams[:2]:
                stream.wait_stream(box_stream)

    def _join(self) -> None:
        """The stream of the boxes waits for those of the branches."""
        if self._event is not None:
            for stream in self._streams[:2]:
                self._streams[2].wait_stream(stream)

    def _send(self, packed: Tensor, counts: Tensor | None) -> None:
        """Copy boxes and counts to the host, without waiting on a GPU."""
        if self._event is None:
            self._host = (packed, counts)
            return
        if self._host is None:
            self._host = tuple(
                None if x is None else torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in (packed, counts)
            )
        for target, source in zip(self._host, (packed, counts), strict=True):
            if source is not None:
                target.copy_(source, non_blocking=True)
        self._event.record()

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def _fits(self) -> bool:
        counts = self._host[1].tolist()
        return all(count <= rows for count, rows in zip(counts, self._capacities.rows, strict=True))

    def _calibrate(self, lidar2img: Tensor) -> None:
        """Take over a calibration whose values are new; frames that fill up the batch have the last one's."""
        filled = lidar2img.cpu().double()
        filled = torch.cat((filled, filled[-1:].expand(self.batch_size - len(filled), -1, -1, -1)))
        if self._calibration is not None and torch.equal(filled, self._calibration):
            return
        inverse = torch.linalg.inv_ex(filled).inverse.to(self.detector.reference_points.weight.dtype)
        if self._calibration is None:
            image_size = tuple(self._images.shape[2:4])
            self._cameras = Cameras(filled.to(self.device, copy=True), inverse.to(self.device, copy=True), image_size)
        else:
            self._cameras.lidar2img.copy_(filled, non_blocking=True)
            self._cameras.img2lidar.copy_(inverse, non_blocking=True)
        self._calibration = filled
        self._has_geometry = False

    def _encode_images(self, images: Tensor) -> Tensor:
        return self.detector.encode_images(images)

    def _encode_points(self, points: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return encode_points_fixed(self.detector.lidar_branch, points, sizes)

    def _compute_geometry(self, layout: TokenLayout, cameras: Cameras | None) -> Geometry:
        return self.detector.compute_geometry(layout, self.batch_size, cameras)

    def _find_boxes(self, bev_map: Tensor | None, pv_maps: Tensor | None, geometry: Geometry) -> Tensor:
        """See :func:`pack`."""
        predictions = self.detector.forward_with_geometry(bev_map, pv_maps, geometry)
        return pack(find_best(predictions, self.decoding, self._tables), predictions.aqr_weights)


def _use_channels_last(detector: Detector) -> None:
    """Weights of 2D convolutions in the layout that is fast on a GPU."""
    branch = detector.lidar_branch
    parts = [detector.image_branch, detector.shared_conv, *((branch.backbone, branch.neck) if branch else ())]
    for part in parts:
        if isinstance(part, nn.Module):
            part.to(memory_format=torch.channels_last)
