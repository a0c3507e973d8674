"""From a model and a loader to official metrics: predict, write the submission, evaluate.

``train.py`` and ``test.py`` call :func:`evaluate`; nothing here depends on how batches are made.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.boxes import Detections
from cmt_aqr.evaluation.nuscenes_eval import Metrics, evaluate_submission
from cmt_aqr.evaluation.postprocess import Decoding, postprocess
from cmt_aqr.evaluation.submission import detections_to_submission, write_submission
from cmt_aqr.nuscenes_tables import Tables

SUBMISSION_FILE = "submission.json"


@dataclass(frozen=True)
class FrameResult:
    """What is kept of one frame: its token, detections (CPU), and the poses that a submission needs, (4, 4) float64."""

    token: str
    detections: Detections
    lidar2ego: Tensor
    ego2global: Tensor


# Images, points and calibration of a batch, on the CPU -> its detections, on the CPU.
Detect = Callable[[Tensor | None, Sequence[Tensor] | None, Tensor | None], list[Detections]]


@torch.inference_mode()
def detect_eagerly(
    model: nn.Module,
    images: Tensor | None,
    points: Sequence[Tensor] | None,
    lidar2img: Tensor | None,
    *,
    device: torch.device,
    precision: torch.dtype,
    decoding: Decoding,
) -> list[Detections]:
    """Move a batch to the device, call the model, decode.

    Args:
        model: a detector; it is put into eval mode and stays there.
        precision: dtype of autocast; float32 switches it off.
    """
    model.eval()
    images, lidar2img = (None if x is None else x.to(device, non_blocking=True) for x in (images, lidar2img))
    points = None if points is None else [cloud.to(device, non_blocking=True) for cloud in points]
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        predictions = model(images, points, lidar2img)
    found = postprocess(
        predictions,
        max_detections=decoding.max_detections,
        post_range=decoding.post_range,
        score_threshold=decoding.score_threshold,
    )
    return [detections.cpu() for detections in found]


def predict(
    detect: Detect,
    batches: Iterable,
    *,
    on_batch: Callable[[object, list[Detections]], None] = lambda batch, detections: None,
) -> list[FrameResult]:
    """Detect in all batches of this process.

    Args:
        detect: :func:`detect_eagerly` with its settings, or an `InferencePipeline`.
        batches: of :class:`cmt_aqr.data.sample.Batch`, on the CPU.
        on_batch: called with every batch (CPU) and its detections (CPU): pictures, statistics.

    Returns:
        One result a frame, in the order of the batches.
    """
    results = []
    for batch in batches:
        detections = detect(batch.images, batch.points, batch.lidar2img)
        on_batch(batch, detections)
        for i, token in enumerate(batch.tokens):
            results.append(FrameResult(token, detections[i], batch.lidar2ego[i], batch.ego2global[i]))
    return results


def save_submission(results: list[FrameResult], path: Path, *, use_camera: bool, use_lidar: bool) -> Path:
    """Write the submission of all frames; a frame that two processes saw counts once."""
    frames = list({result.token: result for result in results}.values())
    rows = detections_to_submission(
        [frame.token for frame in frames],
        [frame.detections for frame in frames],
        torch.stack([frame.lidar2ego for frame in frames]).numpy(),
        torch.stack([frame.ego2global for frame in frames]).numpy(),
    )
    return write_submission(path, rows, use_camera=use_camera, use_lidar=use_lidar)


def evaluate(
    results: list[FrameResult],
    *,
    folder: Path,
    tables: Tables,
    split: str,
    velocity_file: str | None,
    use_camera: bool,
    use_lidar: bool,
) -> Metrics:
    """Write ``folder/submission.json`` and ``folder/metrics.json``; call it in one process, with all results.

    Raises:
        EvaluationError: one sentence on what is wrong with the data or the disk.
    """
    path = save_submission(results, folder / SUBMISSION_FILE, use_camera=use_camera, use_lidar=use_lidar)
    return evaluate_submission(
        tables.dataroot, tables.version, split, path, folder, nusc=tables.nusc, velocity_file=velocity_file
    )
