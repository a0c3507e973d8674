"""Inference from images and points to boxes, computed in several ways: time, busy time of the GPU, memory and error."""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from cmt_aqr.boxes import Detections
from cmt_aqr.build import build_detector
from cmt_aqr.config import Config
from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.evaluation.run import Detect, detect_eagerly
from cmt_aqr.inference import InferencePipeline
from cmt_aqr.jobs import decoding_of, load_model
from cmt_aqr.models.detector import Detector
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.progress import phase
from cmt_aqr.tools.bench_frames import Inputs, inputs_of, made_up_batch, validation_batches
from cmt_aqr.tools.bench_measure import Measured, describe_machine, measure, number
from cmt_aqr.tools.bench_original import in_original_manner
from cmt_aqr.tools.bench_shapes import INFERENCE_WAYS

# Boxes with at least this score are compared, with the nearest box of their class within this many metres.
SURE_SCORE, NEAR_M = 0.1, 1.0


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        checkpoint: weights; None: random ones, whose boxes say little about errors.
        cloud: a LiDAR file (.bin) for made-up frames; None: a made-up scanner.
        frames: frames of the validation split to measure on; 0: one made-up batch, repeated.
        precision: of autocast in all ways: `fp32`, `bf16` or `fp16`.
        compiled: whether our pipelines are compiled; False is for a first look on a CPU.
        ways: of `INFERENCE_WAYS`; ways that differ only in AQR are left out for a model without it.
        stages: whether the stages are timed one by one, too.
        profiled: whether some calls are profiled for the busy time of the GPU.
    """

    checkpoint: str | None
    cloud: str | None
    frames: int
    batch_sizes: tuple[int, ...]
    precision: str
    repeats: int
    compiled: bool
    ways: tuple[str, ...]
    stages: bool
    profiled: bool


@dataclass(frozen=True)
class Difference:
    """Boxes of a way against those of float32 in eager mode: centres (cm), scores, and how many have no match."""

    centre: float
    score: float
    missing: int
    total: int


def inference_lines(config: Config, device: torch.device, options: Options) -> Iterator[str]:
    """The machine, a table for each batch size, then the stages of batch size 1, as Markdown.

    Every line is yielded once it is known.
    """
    detector = build_detector(config.model)
    if options.checkpoint is not None:
        load_model(detector, config, options.checkpoint)
    detector = detector.to(device).eval()
    weights = options.checkpoint or "random weights"
    yield f"{config.name}, {describe_machine(device)}, {options.precision}, {weights}\n"
    for batch_size in options.batch_sizes:
        inputs = make_inputs(config, device, batch_size, options)
        yield from batch_lines(detector, config, device, inputs, options)
    if options.stages:
        yield from stage_lines(detector, config, device, make_inputs(config, device, 1, options), options)


def make_inputs(config: Config, device: torch.device, batch_size: int, options: Options) -> list[Inputs]:
    """Batches in host memory, page-locked where there is a GPU."""
    if options.frames:
        batches = validation_batches(config, batch_size, math.ceil(options.frames / batch_size))
    else:
        batches = [made_up_batch(config, batch_size, cloud=options.cloud)]
    return [inputs_of(batch.pin_memory() if device.type == "cuda" else batch) for batch in batches]


def batch_lines(
    detector: Detector, config: Config, device: torch.device, inputs: Sequence[Inputs], options: Options
) -> Iterator[str]:
    """One line for each way."""
    batch_size = len(inputs[0][2])
    with phase(f"reference in float32, batch {batch_size}"):
        expected = reference_detections(detector, config, device, inputs)
    yield f"batch {batch_size}\n"
    yield "| | median, ms | p99, ms | frames/s | GPU busy, ms | peak, MiB | centre, cm | score | without a match |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for way in ways(config, options.ways):
        name = INFERENCE_WAYS[way]
        compiling = "compiling, " if options.compiled and way.startswith("ours") else ""
        with phase(f"{name}, batch {batch_size}: {compiling}first calls"):
            detect = make_way(way, detector, config, device, batch_size, options)
            found = [each for batch in inputs for each in detect(*batch)]
        difference = None if way.endswith("off") else compare(found, expected)
        with phase(f"{name}, batch {batch_size}: {options.repeats} calls"):
            call = Cycle(detect, inputs)
            measured = measure(call, device, repeats=options.repeats, profiled=options.profiled)
        yield f"| {name} | {cells(measured, difference, batch_size)} |"
    yield ""


class Cycle:
    """Calls a detector with one batch after the other, and begins again after the last one."""

    def __init__(self, detect: Detect, inputs: Sequence[Inputs]) -> None:
        self._detect, self._inputs, self._next = detect, inputs, 0

    def __call__(self) -> list[Detections]:
        """Detections of the next batch."""
        batch = self._inputs[self._next % len(self._inputs)]
        self._next += 1
        return self._detect(*batch)


def ways(config: Config, chosen: Sequence[str]) -> list[str]:
    """The chosen ways that the model has: one without AQR is measured as ``-off`` only."""
    has_aqr = config.model.aqr is not None
    return [way for way in INFERENCE_WAYS if way in chosen and (has_aqr or way.endswith("off"))]


def make_way(
    way: str, detector: Detector, config: Config, device: torch.device, batch_size: int, options: Options
) -> Detect:
    """A detector as a function of a batch."""
    with_aqr = not way.endswith("off")
    if way.startswith("original"):
        return eager(in_original_manner(detector, with_aqr=with_aqr), config, device, options.precision)
    if way == "eager":
        return eager(detector, config, device, options.precision)
    return make_pipeline(detector if with_aqr else without_aqr(detector), config, batch_size, options)


def make_pipeline(detector: Detector, config: Config, batch_size: int, options: Options) -> InferencePipeline:
    """Our way."""
    return InferencePipeline(
        detector,
        decoding=decoding_of(config),
        batch_size=batch_size,
        precision=PRECISIONS[options.precision],
        compiled=options.compiled,
    )


def without_aqr(detector: Detector) -> Detector:
    """A copy without AQR."""
    plain = copy.deepcopy(detector)
    plain.aqr = None
    return plain


def eager(model: nn.Module, config: Config, device: torch.device, precision: str) -> Detect:
    """The detector in eager mode, one operation after the other."""
    decoding = decoding_of(config)
    return partial(detect_eagerly, model, device=device, precision=PRECISIONS[precision], decoding=decoding)


def reference_detections(
    detector: Detector, config: Config, device: torch.device, inputs: Sequence[Inputs]
) -> list[Detections]:
    """Detections of the eager detector in float32 without tf32."""
    convolution, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        detect = eager(detector, config, device, "fp32")
        return [each for batch in inputs for each in detect(*batch)]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matmul


def compare(found: Sequence[Detections], expected: Sequence[Detections]) -> Difference:
    """Largest differences between each box that scores at least 0.1 and the nearest of its class within a metre."""
    centre = score = 0.0
    missing = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        is_sure = theirs.scores >= SURE_SCORE
        total += int(is_sure.sum())
        for box, value, label in zip(
            theirs.boxes[is_sure], theirs.scores[is_sure], theirs.labels[is_sure], strict=True
        ):
            same = ours.labels == label
            distance = (ours.boxes[same, :3] - box[:3]).norm(dim=-1)
            if not len(distance) or distance.min() > NEAR_M:
                missing += 1
                continue
            centre = max(centre, 100 * distance.min().item())
            score = max(score, (ours.scores[same][distance.argmin()] - value).abs().item())
    return Difference(centre, score, missing, total)


def cells(measured: Measured, difference: Difference | None, batch_size: int) -> str:
    """The cells of a line after its name."""
    values = [number(measured.median, 2), number(measured.p99, 2), number(1e3 * batch_size / measured.median)]
    values += [number(measured.busy, 2), number(measured.peak, 0)]
    if difference is None:
        return " | ".join([*values, "-", "-", "-"])
    counts = f"{difference.missing} of {difference.total}"
    return " | ".join([*values, number(difference.centre, 2), f"{difference.score:.1e}", counts])


def stage_lines(
    detector: Detector, config: Config, device: torch.device, inputs: Sequence[Inputs], options: Options
) -> Iterator[str]:
    """Time of each stage alone, in eager mode and, on a GPU, as a replay of its graph."""
    with phase("stages: compiling" if options.compiled else "stages: first call"):
        pipeline = make_pipeline(detector, config, 1, options)
        pipeline(*inputs[0])
    calls = stage_calls(detector, config, device, inputs[0], options)
    yield from ("stages, batch 1\n", "| | eager, ms | GPU busy, ms | one graph, ms |", "|---|---|---|---|")
    for name, call in calls.items():
        with phase(f"stage {name}: {options.repeats} calls"):
            measured = measure(call, device, repeats=options.repeats, profiled=options.profiled)
        stage = pipeline.stages.get(name)
        replay = None
        if stage is not None and stage.is_captured:
            replay = statistics.median(replay_times(stage.run, repeats=options.repeats))
        yield f"| {name} | {number(measured.median, 2)} | {number(measured.busy, 2)} | {number(replay, 2)} |"
    yield ""


def replay_times(run, *, repeats: int) -> list[float]:
    """Milliseconds on the GPU of each replay of a graph."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def stage_calls(
    detector: Detector, config: Config, device: torch.device, inputs: Inputs, options: Options
) -> dict[str, Callable[[], object]]:
    """The stages of the pipeline that the model has, to be called one by one in eager mode."""
    images, points, lidar2img = inputs
    images = None if detector.image_branch is None else images.to(device)
    points = None if detector.lidar_branch is None else [cloud.to(device) for cloud in points]
    lidar2img, decoding = lidar2img.to(device), decoding_of(config)
    precision = PRECISIONS[options.precision]

    def ready(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32),
            ):
                return call()

        return run

    pv_maps = ready(lambda: detector.encode_images(images))()
    bev_map = ready(lambda: detector.encode_points(points))()
    size = None if images is None else tuple(images.shape[2:4])
    cameras = ready(lambda: detector.make_cameras(pv_maps, lidar2img, size))()
    layout = detector.make_layout(bev_map, pv_maps)
    geometry = ready(lambda: detector.compute_geometry(layout, len(lidar2img), cameras))()

    def boxes() -> list[Detections]:
        predictions = detector.forward_with_geometry(bev_map, pv_maps, geometry)
        return postprocess(
            predictions,
            max_detections=decoding.max_detections,
            post_range=decoding.post_range,
            score_threshold=decoding.score_threshold,
        )

    calls = {
        "images": lambda: detector.encode_images(images),
        "points": lambda: detector.encode_points(points),
        "geometry": lambda: detector.compute_geometry(layout, len(lidar2img), cameras),
        "boxes": boxes,
    }
    present = {"images": images is not None, "points": points is not None}
    return {name: ready(call) for name, call in calls.items() if present.get(name, True)}
