"""The probe of a training run: the same few validation frames, inspected after every epoch."""

import torch

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.build import evaluation_dataset, open_split
from cmt_aqr.config import Config
from cmt_aqr.data.sample import Batch, collate
from cmt_aqr.errors import UserError
from cmt_aqr.inspection import inspect, probe_metrics
from cmt_aqr.models.detector import Detector
from cmt_aqr.run import Run
from cmt_aqr.training.logs import RunLog

# Frames of the probe, evenly spread over the validation split.
NUM_FRAMES = 4


def log_probe(run: Run, log: RunLog) -> None:
    """At the end of an epoch of a model with AQR, record the metrics of the probe (kind "probe") in the main process.

    An error in the frames is printed, and training continues without them.
    """
    if run.model.aqr is None or not run.rank_info.is_main or run.step % run.steps_per_epoch:
        return
    try:
        if run.probe is None:
            run.probe = probe_frames(run.config)
    except (UserError, OSError) as error:
        log.print(f"no metrics of the attention during this training: {error}")
        run.probe = []
    if run.probe:
        metrics = probe(run.model, run.probe, run.rank_info.device)
        log.record("probe", run.step, epoch=run.step // run.steps_per_epoch, **metrics)


def probe_frames(config: Config) -> list[Batch]:
    """The frames of the probe, as an evaluation sees them, one a batch."""
    dataset = evaluation_dataset(config, open_split(config.data, config.data.val_split))
    count = min(NUM_FRAMES, len(dataset))
    return [collate([dataset[(2 * i + 1) * len(dataset) // (2 * count)]]) for i in range(count)]


def probe(model: Detector, frames: list[Batch], device: torch.device) -> dict[str, float | dict[str, float]]:
    """Metrics of the probe, in float32; leaves the model in evaluation mode and draws no random number.

    Args:
        model: with AQR.
        frames: of :func:`probe_frames`.
    """
    model.eval()
    scale = model.aqr.scale().item() if isinstance(model.aqr, BiasRouter) else None
    moved = [frame.to(device) for frame in frames]
    return probe_metrics([inspect(model, frame.images, frame.points, frame.lidar2img) for frame in moved], scale)
