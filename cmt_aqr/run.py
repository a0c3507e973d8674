"""A training run: its record, its parts made from the configuration, and the losses of its current step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cmt_aqr.box_format import BoxChoice
from cmt_aqr.build import build_criterion, build_detector, check_training, training_dataset
from cmt_aqr.config import Config, ConfigError
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.loader import Loader, make_loader
from cmt_aqr.data.sample import Batch
from cmt_aqr.data.sampling import TrainingSampler
from cmt_aqr.devices import HostCopy, to_device
from cmt_aqr.files import atomic_path
from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.models.compiled import CompiledDetector
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.grid_mask import draw_grid_mask, grid_mask
from cmt_aqr.models.local_init import init_reference_points
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.predictions import DenoisingQueries
from cmt_aqr.progress import counted
from cmt_aqr.strict_yaml import to_yaml
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights
from cmt_aqr.training.checkpoint_checks import check_finite
from cmt_aqr.training.distributed import RankInfo, reduce_max, reduce_mean, wrap
from cmt_aqr.training.optim import (
    freeze,
    make_average,
    make_optimizer,
    rates,
    set_schedule,
)
from cmt_aqr.training.seeding import denoising_noise, seed_step


@dataclass(frozen=True)
class StepRecord:
    """A step that has been launched: what is needed to report it if it proves not finite.

    Attributes:
        step: its number.
        batch: of this process.
        terms: loss terms of this process, on the device.
        numbers: loss and gradient norm, on their way to the host.
    """

    step: int
    batch: Batch
    terms: dict[str, Tensor]
    numbers: HostCopy


@dataclass
class Run:
    """The parts of a training run, and its progress.

    Attributes:
        model: the detector.
        ddp_model: the same as the training calls it: compiled where `training.compile` says so, in
            DistributedDataParallel where there are several processes.
        tables: of the data set, for all evaluations of the run.
        average: running average of the weights; None without ``training.ema_decay``.
        loader: of the training split; None where a single step is replayed.
        steps_per_epoch: optimizer steps, the same for any number of processes.
        last_step: the run ends after this many steps.
        step: finished optimizer steps.
        saved_step: of the checkpoint in the work dir, None before the first.
        probe: validation frames that are inspected after every epoch; None before the first time.
        skipped_steps: steps since the last line of the log whose update the gradient scaler skipped.
        checks_late: whether a step is checked during the next one, so that nothing waits for the GPU.
        unchecked: the last step, until it has been checked.
        loss: of the last step that has been checked, in this process.
        after_step: called after every step; the profiler's, where there is one.
    """

    config: Config
    rank_info: RankInfo
    work_dir: Path
    model: Detector
    ddp_model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tables: Tables
    average: AveragedModel | None = None
    loader: Loader | None = None
    steps_per_epoch: int = 0
    last_step: int = 0
    step: int = 0
    saved_step: int | None = None
    probe: list[Batch] | None = None
    skipped_steps: int = 0
    checks_late: bool = False
    unchecked: StepRecord | None = None
    loss: float | None = None
    after_step: Callable[[], None] = field(default=lambda: None)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.steps_per_epoch * self.config.training.epochs

    @property
    def evaluated(self) -> nn.Module:
        """The detector that is evaluated: the running average of the weights where there is one."""
        return self.model if self.average is None else self.average.module


@dataclass(frozen=True)
class Part:
    """What one forward and backward pass works on.

    Attributes:
        batch: frames of this process's share of a step, on the device; all of them unless training.accumulation > 1.
        denoising: queries from their ground truth.
        stream: seed of what is drawn in the pass; the rank of the process in the first part.
        counts: what normalises the loss of several parts; None where there is one.
    """

    batch: Batch
    denoising: DenoisingQueries | None
    stream: int
    counts: Tensor | None = None


def check_settings(config: Config, rank_info: RankInfo) -> None:
    """Refuse, before anything is written, a run that cannot work: its batch, its attention, its parameter names."""
    if config.model.aqr is not None and config.model.attention.backend == "lowrank":
        raise ConfigError(["model.attention.backend: 'lowrank' gives AQR no gradient; it is for test.py only"])
    check_training(config, rank_info.device)
    is_score_mod = config.model.aqr is not None and config.model.attention.backend == "score_mod"
    if is_score_mod and rank_info.device.type == "cpu":
        raise ConfigError(["model.attention.backend: 'score_mod' cannot train on a CPU, only evaluate; use 'dense'"])
    size, parts = config.training.batch_size, config.training.accumulation
    if size % rank_info.world_size:
        raise ConfigError([f"training.batch_size: {size} is not a multiple of the {rank_info.world_size} processes"])
    share = size // rank_info.world_size
    if share % parts:
        raise ConfigError(
            [f"training.accumulation: {parts} does not divide the {share} frames of a step in each process"]
        )


def check_init_from(config: Config) -> None:
    """Refuse to prepare hours of data for a run whose first weights are not there."""
    path = config.training.init_from
    if path is not None and not Path(path).is_file():
        raise CheckpointError(f"training.init_from {path}: no such file")


def build_run(config: Config, rank_info: RankInfo, work_dir: Path) -> Run:
    """Model with fresh weights, criterion and optimizer of a run; its loader and steps are for the caller to set."""
    model = build_detector(config.model).to(rank_info.device)
    freeze(model, config.training.freeze)
    decay = config.training.ema_decay
    criterion = build_criterion(
        config, reduce_mean=reduce_mean, num_processes=rank_info.world_size * config.training.accumulation
    )
    called: nn.Module = model
    if is_compiled(config, rank_info.device):
        called = CompiledDetector(
            model, masks_images=model.image_branch is not None and config.model.camera.grid_mask > 0
        )
        criterion.compile_terms()
    return Run(
        config=config,
        rank_info=rank_info,
        work_dir=work_dir,
        model=model,
        optimizer=build_optimizer(model, config),
        ddp_model=wrap(called, rank_info),
        average=None if decay is None else make_average(model, decay),
        criterion=criterion,
        scaler=torch.amp.GradScaler(rank_info.device.type, enabled=config.training.precision == "fp16"),
        tables=Tables(config.data.root, config.data.version),
        checks_late=rank_info.device.type == "cuda",
    )


def is_compiled(config: Config, device: torch.device) -> bool:
    """What `training.compile` means on a device: `auto` compiles on a GPU what can be compiled."""
    if config.training.compile != "auto":
        return config.training.compile
    is_score_mod = config.model.aqr is not None and config.model.attention.backend == "score_mod"
    return device.type == "cuda" and not is_score_mod


def write_config(work_dir: Path, config: Config) -> None:
    """Keep the resolved configuration as ``config.yaml``.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    path = work_dir / "config.yaml"
    try:
        with atomic_path(path) as partial:
            partial.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written: {error.strerror}; the checkpoints of this work dir are untouched"
        ) from None


def resume_hint(work_dir: Path) -> str:
    """How to resume, for the end of a sentence."""
    return f"resume with --resume --work-dir {work_dir}"


def make_training_loader(config: Config, index: FrameIndex, rank_info: RankInfo) -> tuple[Loader, int]:
    """Batches of this process, and how many of them make an epoch, whatever the number of processes."""

    def sampler(rank: int, world_size: int) -> TrainingSampler:
        return TrainingSampler(
            frame_labels=index.frame_labels(config.data.balance_boxes),
            class_balanced=config.data.class_balanced,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )

    # The loader of one of several processes may have one more: samplers round up.
    steps_per_epoch = len(sampler(0, 1)) // config.training.batch_size
    loader = make_loader(
        training_dataset(config, index),
        sampler=sampler(rank_info.rank, rank_info.world_size),
        batch_size=config.training.batch_size // rank_info.world_size,
        num_workers=config.data.workers,
        drop_last=steps_per_epoch > 0,
    )
    return loader, max(1, steps_per_epoch)


def training_centres(index: FrameIndex, choice: BoxChoice) -> Tensor:
    """Centres (N, 3) of the training split's boxes that training uses, metres, LiDAR frame."""
    frames = counted(range(len(index)), "box centres of the training frames", total=len(index), unit="frame")
    return torch.cat([index.frame(i).targets(choice).boxes[:, :3] for i in frames])


def initialise(model: nn.Module, path: str) -> str:
    """Start from a checkpoint of this project, or from backbone weights (torchvision's names); returns what fits."""
    weights = load_weights(path)
    own = model.state_dict()
    prefix = next((p for p in ("", "image_branch.backbone.") if any(p + name in own for name in weights)), None)
    if prefix is None:
        raise CheckpointError(f"training.init_from {path}: no tensor in it has a name of this model")
    fitting = {prefix + name: value for name, value in weights.items() if prefix + name in own}
    check_finite(fitting, f"training.init_from {path}")
    load_into(model, {**own, **fitting}, path)
    return f"init_from {path}: {len(fitting)} of {len(own)} tensors of the model taken"


def set_first_weights(model: Detector, config: Config, index: FrameIndex) -> list[str]:
    """Reference points and weights that a new run starts from; returns notes for the log."""
    if config.model.init == "local":
        init_reference_points(model, training_centres(index, config.data.train_boxes), config.model.point_range)
    if config.training.init_from is None:
        return []
    return [initialise(model, config.training.init_from)]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with the configuration's factors."""
    training = config.training
    return make_optimizer(
        model,
        lr=training.lr,
        weight_decay=training.weight_decay,
        lr_mult=training.lr_mult,
        decay_mult=training.decay_mult,
    )


def set_rates(run: Run) -> None:
    """Learning rate and momentum of the current step, from the step alone."""
    lr, momentum = rates(run.config.training, run.step, run.total_steps)
    set_schedule(run.optimizer, lr=lr, momentum=momentum)


def split_batch(run: Run, batch: Batch) -> list[Part]:
    """The parts of this process's share of a step's batch, as many as ``training.accumulation`` says.

    With several parts the loss of each is normalised by the counts of the whole batch, so that the mean of their
    gradients is that of the whole batch, as it is over processes.
    """
    rank, world_size = run.rank_info.rank, run.rank_info.world_size
    batch = batch.to(run.rank_info.device, non_blocking=True)
    size = -(-len(batch) // run.config.training.accumulation)
    max_boxes = reduce_max(max(len(targets.labels) for targets in batch.targets))
    parts = []
    for number, first in enumerate(range(0, len(batch), size)):
        part = batch.part(first, first + size)
        positions = range(rank + first * world_size, rank + (first + len(part)) * world_size, world_size)
        denoising = make_denoising_queries(run, part, positions, max_boxes)
        parts.append(Part(part, denoising, stream=rank + number * world_size))
    if len(parts) == 1:
        return parts
    num_queries = run.config.model.num_queries
    counts = [run.criterion.count(part.batch.targets, part.denoising, num_queries=num_queries) for part in parts]
    counts = reduce_mean(torch.stack(counts).mean(0))
    return [replace(part, counts=counts) for part in parts]


def compute_losses(run: Run, part: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Forward pass of the current step on one part of the batch.

    Returns:
        Loss terms by name, and metrics of AQR (empty without it).

    Raises:
        NonFiniteError: the output of the network or a matching cost is not finite, in this process or another.
    """
    config, device, batch = run.config, run.rank_info.device, part.batch
    shared_rng = seed_step(config.seed, run.step, part.stream)
    precision = PRECISIONS[config.training.precision]
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        mask = draw_image_mask(config, batch, shared_rng)
        predictions = run.ddp_model(batch.images, batch.points, batch.lidar2img, part.denoising, image_mask=mask)
    terms = run.criterion(predictions, batch.targets, part.denoising, counts=part.counts)
    metrics = {} if predictions.aqr_weights is None else run.model.aqr.metrics(predictions.aqr_weights)
    return terms, metrics


def make_denoising_queries(run: Run, batch: Batch, positions: range, max_boxes: int) -> DenoisingQueries | None:
    """Denoising queries of some frames.

    Args:
        positions: of the frames in the batch of all processes.
        max_boxes: boxes of the fullest frame there.
    """
    settings = run.config.model.denoising
    if settings.num_dn == 0:
        return None
    noise = denoising_noise(run.config.seed, run.step, positions, settings.num_dn)
    return make_denoising(
        batch.targets,
        num_queries=run.config.model.num_queries,
        num_dn=settings.num_dn,
        point_range=run.config.model.point_range,
        settings=DenoisingSettings(settings.max_groups, settings.noise_scale, settings.positive_threshold),
        max_boxes=max_boxes,
        noise=to_device(noise, run.rank_info.device),
    )


def draw_image_mask(config: Config, batch: Batch, rng: np.random.Generator) -> Tensor | None:
    """GridMask of this step, the same for every image and process."""
    if batch.images is None or config.model.camera.grid_mask == 0:
        return None
    height, width = batch.images.shape[2:4]
    draw = draw_grid_mask(rng, height=height, probability=config.model.camera.grid_mask)
    return None if draw is None else grid_mask(draw, height=height, width=width, device=batch.images.device)
