"""From a model and a loader to official metrics: predict, write the submission, evaluate.

``train.py`` and ``test.py`` call :func:`evaluate`; nothing here knows how batches are made.
"""

from collections.abc import Callable, Iterable
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


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable,
    *,
    device: torch.device,
    precision: torch.dtype,
    decoding: Decoding,
    on_batch: Callable[[object, list[Detections]], None] = lambda batch, detections: None,
) -> list[FrameResult]:
    """Run the model over all batches of this process.

    Args:
        model: a detector; it is put into eval mode and stays there.
        batches: of :class:`cmt_aqr.data.sample.Batch`, on the CPU.
        precision: dtype of autocast; float32 switches it off.
        on_batch: called with every batch (CPU) and its detections (CPU): pictures, statistics.

    Returns:
        One result a frame, in the order of the batches.
    """
    model.eval()
    results = []
    for batch in batches:
        moved = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            predictions = model(moved.images, moved.points, moved.lidar2img)
        detections = [
            found.cpu()
            for found in postprocess(
                predictions,
                max_detections=decoding.max_detections,
                post_range=decoding.post_range,
                score_threshold=decoding.score_threshold,
            )
        ]
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
