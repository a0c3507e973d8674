"""Train a detector, evaluate it, draw what it sees.

    python train.py configs/synthetic_tiny.yaml
    python train.py configs/cmt_r50_800x320.yaml --set data.root=/data/nuscenes training.batch_size=8
    torchrun --nproc_per_node=8 train.py configs/cmt_r50_800x320.yaml --work-dir runs/r50
    python train.py configs/cmt_r50_800x320.yaml --work-dir runs/r50 --resume

Results go to the work dir (runs/<name of the configuration>): config.yaml, log.jsonl, tensorboard/, latest.pt,
epoch_*.pt and, for every evaluation, eval/epoch_N/ with submission.json, metrics.json and pictures/.
docs/architecture.md explains the parts.
"""

import argparse
import math
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.build import (
    build_criterion,
    build_detector,
    check_device,
    count_parameters,
    open_split,
    training_dataset,
)
from cmt_aqr.config import Config, ConfigError, load_config
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.loader import Loader, make_loader
from cmt_aqr.data.sample import Batch
from cmt_aqr.data.sampling import TrainingSampler
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.evaluation.nuscenes_eval import Tables, format_table
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.models.denoising import make_denoising
from cmt_aqr.models.grid_mask import draw_grid_mask, grid_mask
from cmt_aqr.models.local_start import start_reference_points
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.predictions import DenoisingQueries
from cmt_aqr.strict_yaml import to_yaml
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights
from cmt_aqr.training.distributed import (
    Processes,
    any_process,
    main_first,
    processes,
    reduce_max,
    reduce_mean,
    share_buffers,
    wrap,
)
from cmt_aqr.training.logs import RunLog, read_log
from cmt_aqr.training.optim import (
    BETA1,
    check_norm_prefixes,
    check_prefixes,
    cyclic,
    freeze,
    make_optimizer,
    set_schedule,
    set_training_mode,
)
from cmt_aqr.training.run_folder import LATEST, find_checkpoint, make_work_dir, remove_run, restore, save
from cmt_aqr.training.seeding import denoising_noise, seed_process, seed_step
from cmt_aqr.training.signals import stop_signals
from test import evaluate_split, prepare_data


class TrainingStopped(UserError):
    """The run cannot go on: a loss that is not finite."""


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments()

    def run() -> int:
        config = load_config(arguments.config, arguments.set)
        with processes(arguments.device) as place:
            return train(config, place, arguments)

    return report_errors(run)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file, such as configs/synthetic_tiny.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys, e.g. training.epochs=3"
    )
    parser.add_argument("--work-dir", type=Path, help="where results go (default: runs/<name>)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the work dir's latest checkpoint")
    start.add_argument("--overwrite", action="store_true", help="remove the run that the work dir holds; start anew")
    parser.add_argument("--seed", type=int, help="replaces the configuration's seed")
    parser.add_argument("--deterministic", action="store_true", help="repeat a run bit for bit; slower")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    parser.add_argument("--max-steps", type=int, help="stop (resumable) after this many steps in all; for trials")
    arguments = parser.parse_args()
    if arguments.max_steps is not None and arguments.max_steps < 1:
        parser.error(f"argument --max-steps: expected at least 1, got {arguments.max_steps}")
    if arguments.seed is not None:
        arguments.set.append(f"seed={arguments.seed}")
    return arguments


def train(config: Config, place: Processes, arguments: argparse.Namespace) -> int:
    """Prepare everything, then run the epochs that are left; returns the exit status."""
    work_dir = arguments.work_dir or Path("runs") / config.name
    check_settings(config, place)
    checkpoint = find_checkpoint(work_dir, config, resume=arguments.resume, overwrite=arguments.overwrite)
    if checkpoint is None:
        check_start(config)
    make_work_dir(work_dir)
    seed_process(config.seed, deterministic=arguments.deterministic)
    with main_first(place):
        prepare_data(config, talk=place.is_main)
        index = open_split(config.data, config.data.train_split)
        loader, steps_per_epoch = make_training_loader(config, index, place)
        open_split(config.data, config.data.val_split)  # a wrong name must not wait for the first evaluation

    model = build_detector(config.model).to(place.device)
    if config.model.start == "local" and checkpoint is None:
        start_reference_points(model, training_centres(index), config.model.point_range)
    start = ""
    if config.training.init_from is not None and checkpoint is None:
        start = initialise(model, config.training.init_from)
    freeze(model, config.training.freeze)
    criterion = build_criterion(config, reduce_mean=reduce_mean, num_processes=place.world_size)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(place.device.type, enabled=config.training.precision == "fp16")
    parallel = wrap(model, place)
    tables = Tables(config.data.root, config.data.version)  # for all evaluations of this run

    total_steps = steps_per_epoch * config.training.epochs
    last_step = min(total_steps, arguments.max_steps or total_steps)
    step = 0
    if checkpoint is not None:
        step = restore(checkpoint, model, optimizer, scaler)
    elif arguments.overwrite and place.is_main:
        remove_run(work_dir)
    with RunLog(work_dir, place.is_main, resume_step=step or None) as log:
        describe(config, place, model, steps_per_epoch, step, work_dir, log)
        if start:
            log.say(start)
        if arguments.resume and checkpoint is None:
            log.say(f"{work_dir} holds no {LATEST} to resume from: starting anew")
        if checkpoint is not None:
            evaluate_epoch(model, config, place, step, steps_per_epoch, work_dir, log, tables)
        with log.progress("train", total_steps, step) as progress:
            while step < last_step:
                epoch, first = divmod(step, steps_per_epoch)
                loader.set_epoch(epoch, first)
                with stop_signals() as stop:
                    clock = progress.restart_clock()
                    for batch in islice(loader, steps_per_epoch - first):
                        data_time = time.perf_counter() - clock
                        set_rates(optimizer, config, step, total_steps)
                        terms, grad_norm = train_step(
                            parallel, criterion, optimizer, scaler, batch, config, place, step, names=model
                        )
                        step += 1
                        step_time = time.perf_counter() - clock
                        if step % config.training.log_every == 0 or step == total_steps:
                            record(log, optimizer, terms, grad_norm, step, steps_per_epoch, data_time, step_time)
                        figures = {"epoch": step / steps_per_epoch, "lr": optimizer.param_groups[0]["lr"]}
                        progress.advance(loss=terms["loss"], **figures)
                        is_interrupted = any_process(stop.is_set, place.device)
                        if is_interrupted or step == last_step:
                            break
                        clock = time.perf_counter()
                is_last = is_interrupted or step == last_step
                if place.is_main and (is_last or step // steps_per_epoch % config.training.save_every == 0):
                    save(work_dir, config, model, optimizer, scaler, step, steps_per_epoch)
                if is_interrupted:
                    log.say(f"stopped after step {step}; go on with --resume --work-dir {work_dir}")
                    return 130
                evaluate_epoch(model, config, place, step, steps_per_epoch, work_dir, log, tables)
        if step < total_steps:
            log.say(f"stopped after step {step} (--max-steps); go on with --resume --work-dir {work_dir}")
        else:
            log.say(f"finished: weights {work_dir / LATEST}, log {log.path}")
    return 0


def evaluate_epoch(
    model: nn.Module,
    config: Config,
    place: Processes,
    step: int,
    steps_per_epoch: int,
    work_dir: Path,
    log: RunLog,
    tables: Tables,
) -> None:
    """Evaluate where an evaluation is due after this step and the log has none: also after a stop in the middle of one.

    Trouble with the ground truth or the disk is said and logged, and the run goes on: the weights are safe.
    """
    epoch, rest = divmod(step, steps_per_epoch)
    is_due = rest == 0 and (epoch % config.training.eval_every == 0 or epoch == config.training.epochs)
    if is_due and place.is_main:
        is_due = not any(line["kind"] == "eval" and line["step"] == step for line in read_log(log.path))
    if not any_process(is_due and place.is_main, place.device):
        return
    share_buffers(model)
    try:
        folder = work_dir / "eval" / f"epoch_{epoch}"
        metrics = evaluate_split(model, config, config.data.val_split, place, folder, log, tables)
    except EvaluationError as error:
        log.say(f"epoch {epoch} could not be evaluated: {error}")
        log.record("eval", step, epoch=epoch, error=str(error))
        return
    if metrics is not None:
        log.record("eval", step, epoch=epoch, **metrics.scalars())
        log.say(format_table(metrics))


def check_settings(config: Config, place: Processes) -> None:
    """Refuse a batch that the processes cannot share equally, and an attention that cannot run or learn."""
    if config.model.aqr is not None and config.model.attention.backend == "lowrank":
        raise ConfigError(["model.attention.backend: 'lowrank' gives AQR no gradient; it is for test.py only"])
    check_device(config.model, place.device)
    size = config.training.batch_size
    if size % place.world_size:
        raise ConfigError([f"training.batch_size: {size} is not a multiple of the {place.world_size} processes"])


def check_start(config: Config) -> None:
    """Refuse to prepare hours of data for a run whose first weights are not there."""
    path = config.training.init_from
    if path is not None and not Path(path).is_file():
        raise CheckpointError(f"training.init_from {path}: no such file")


def make_training_loader(config: Config, index: FrameIndex, place: Processes) -> tuple[Loader, int]:
    """Batches of this process, and how many of them make an epoch, whatever the number of processes."""

    def sampler(rank: int, world_size: int) -> TrainingSampler:
        return TrainingSampler(
            frame_labels=index.frame_labels,
            class_balanced=config.data.class_balanced,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )

    # The loader of one of several processes may have one more: samplers round up.
    steps_per_epoch = len(sampler(0, 1)) // config.training.batch_size
    loader = make_loader(
        training_dataset(config, index),
        sampler=sampler(place.rank, place.world_size),
        batch_size=config.training.batch_size // place.world_size,
        num_workers=config.data.workers,
        drop_last=steps_per_epoch > 0,
    )
    return loader, max(1, steps_per_epoch)


def training_centres(index: FrameIndex) -> Tensor:
    """Centres (N, 3) of all boxes of the training split that a sensor saw, metres, LiDAR frame."""
    return torch.cat([index.frame(i).targets(valid_only=True).boxes[:, :3] for i in range(len(index))])


def initialise(model: nn.Module, path: str) -> str:
    """Start from a checkpoint of this project, or from backbone weights (torchvision's names); says how much of it."""
    weights = load_weights(path)
    own = model.state_dict()
    prefix = next((p for p in ("", "image_branch.backbone.") if any(p + name in own for name in weights)), None)
    if prefix is None:
        raise CheckpointError(f"training.init_from {path}: no tensor in it has a name of this model")
    fitting = {prefix + name: value for name, value in weights.items() if prefix + name in own}
    load_into(model, {**own, **fitting}, path)
    return f"init_from {path}: {len(fitting)} of {len(own)} tensors of the model taken"


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with the configuration's factors, after checking that every prefix means something."""
    training = config.training
    for key in ("lr_mult", "decay_mult", "freeze"):
        check_prefixes(model, list(getattr(training, key)), f"training.{key}")
    check_norm_prefixes(model, training.norm_eval, "training.norm_eval")
    return make_optimizer(
        model,
        lr=training.lr,
        weight_decay=training.weight_decay,
        lr_mult=training.lr_mult,
        decay_mult=training.decay_mult,
    )


def set_rates(optimizer: torch.optim.Optimizer, config: Config, step: int, total_steps: int) -> None:
    """Learning rate and momentum of this step, from the step alone."""
    training = config.training
    rate = cyclic(step, total_steps, up_fraction=training.up_fraction, top=training.lr_peak, end=training.lr_end)
    momentum = cyclic(step, total_steps, up_fraction=training.up_fraction, top=training.momentum_dip, end=1.0)
    set_schedule(optimizer, lr=training.lr * rate, momentum=BETA1 * momentum)


def train_step(
    parallel: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: Config,
    place: Processes,
    step: int,
    *,
    names: nn.Module,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step; returns the loss terms, their sum as ``loss`` and figures of AQR, and the gradient's norm."""
    set_training_mode(names, (*config.training.freeze, *config.training.norm_eval))
    shared_rng = seed_step(config.seed, step, place.rank)
    batch = batch.to(place.device, non_blocking=True)
    precision = PRECISIONS[config.training.precision]
    with torch.autocast(place.device.type, dtype=precision, enabled=precision != torch.float32):
        denoising = noise_targets(batch, config, place, step)
        mask = draw_image_mask(batch, config, shared_rng)
        predictions = parallel(batch.images, batch.points, batch.lidar2img, denoising, image_mask=mask)
    terms = criterion(predictions, batch.targets, denoising)
    loss = total_loss(terms)
    if not math.isfinite(loss.item()):
        shown = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
        raise TrainingStopped(f"step {step}: the loss is {loss.item()}; samples {', '.join(batch.tokens)}; {shown}")
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parallel.parameters(), config.training.grad_clip)
    scaler.step(optimizer)
    names.clamp_parameters()
    scaler.update()
    figures = {} if predictions.aqr_weights is None else names.aqr.figures(predictions.aqr_weights)
    return {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}, **figures}, grad_norm


def noise_targets(batch: Batch, config: Config, place: Processes, step: int) -> DenoisingQueries | None:
    """Denoising queries of this process's part of the batch."""
    settings = config.model.denoising
    if settings.num_dn == 0:
        return None
    size = len(batch)
    return make_denoising(
        batch.targets,
        num_queries=config.model.num_queries,
        num_dn=settings.num_dn,
        point_range=config.model.point_range,
        max_groups=settings.max_groups,
        noise_scale=settings.noise_scale,
        split=settings.split,
        max_boxes=reduce_max(max(len(targets.labels) for targets in batch.targets), place.device),
        noise=denoising_noise(
            config.seed, step, range(place.rank, size * place.world_size, place.world_size), settings.num_dn
        ),
    )


def draw_image_mask(batch: Batch, config: Config, rng) -> Tensor | None:
    """GridMask of this step, the same for every image and process."""
    if batch.images is None or config.model.camera.grid_mask == 0:
        return None
    height, width = batch.images.shape[2:4]
    draw = draw_grid_mask(rng, height=height, probability=config.model.camera.grid_mask)
    return None if draw is None else grid_mask(draw, height=height, width=width, device=batch.images.device)


def record(log, optimizer, terms, grad_norm, step, steps_per_epoch, data_time, step_time) -> None:
    """One line of the log; the terms are means over the processes."""
    names = list(terms)
    values = reduce_mean(torch.stack([terms[name].double() for name in names])).tolist()
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    log.record(
        "train",
        step,
        epoch=step / steps_per_epoch,
        lr=optimizer.param_groups[0]["lr"],
        grad_norm=grad_norm,
        data_time=data_time,
        step_time=step_time,
        memory_gib=memory,
        **dict(zip(names, values, strict=True)),
    )


def describe(
    config: Config, place: Processes, model: nn.Module, steps_per_epoch: int, step: int, work_dir: Path, log: RunLog
) -> None:
    """Say what is about to happen, and keep the resolved configuration."""
    if place.is_main:
        (work_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    log.say(
        f"{config.name}: {count_parameters(model) / 1e6:.1f} M parameters, {place.world_size} x {place.device.type}, "
        f"{config.training.precision}, {config.training.epochs} epochs of {steps_per_epoch} steps, "
        f"results in {work_dir}"
    )
    if model.aqr is not None:
        log.say(model.aqr.describe(place.device))
    if step:
        log.say(f"resuming after step {step}")


if __name__ == "__main__":
    sys.exit(main())
