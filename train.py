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

from cmt_aqr.build import build_criterion, build_detector, check_splits, count_parameters, open_split
from cmt_aqr.config import Config, load_config
from cmt_aqr.data.sample import Batch
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.evaluation.nuscenes_eval import Tables, format_table
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.jobs import evaluate_split, prepare_data
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.run import (
    Run,
    build_optimizer,
    check_init_from,
    check_settings,
    compute_losses,
    make_training_loader,
    set_first_weights,
    set_rates,
)
from cmt_aqr.strict_yaml import to_yaml
from cmt_aqr.training.distributed import (
    RankInfo,
    any_process,
    main_first,
    process_group,
    reduce_mean,
    share_buffers,
    wrap,
)
from cmt_aqr.training.logs import Progress, RunLog, read_log
from cmt_aqr.training.optim import freeze, set_training_mode
from cmt_aqr.training.run_folder import LATEST, find_checkpoint, make_work_dir, remove_run, restore, save
from cmt_aqr.training.seeding import seed_process
from cmt_aqr.training.signals import stop_signals


class TrainingStopped(UserError):
    """The run cannot continue: a loss that is not finite."""


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments()

    def run() -> int:
        config = load_config(arguments.config, arguments.set)
        with process_group(arguments.device) as rank_info:
            return train(config, rank_info, arguments)

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
    start.add_argument("--resume", action="store_true", help="continue from the work dir's latest checkpoint")
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


def train(config: Config, rank_info: RankInfo, arguments: argparse.Namespace) -> int:
    """Set up, run the epochs that are left, finish; returns the exit status."""
    work_dir = arguments.work_dir or Path("runs") / config.name
    run, notes, is_resumed = set_up(config, rank_info, work_dir, arguments)
    with RunLog(work_dir, rank_info.is_main, resume_step=run.step or None) as log:
        describe(run, log)
        for note in notes:
            log.print(note)
        if is_resumed:
            evaluate_epoch(run, log)  # where the run was stopped in the middle of one
        if not train_epochs(run, log):
            log.print(f"stopped after step {run.step}; {resume_hint(work_dir)}")
            return 130
        if run.step < run.total_steps:
            log.print(f"stopped after step {run.step} (--max-steps); {resume_hint(work_dir)}")
        else:
            log.print(f"finished: weights {work_dir / LATEST}, log {log.path}")
    return 0


def set_up(
    config: Config, rank_info: RankInfo, work_dir: Path, arguments: argparse.Namespace
) -> tuple[Run, list[str], bool]:
    """Everything a run needs, restored from the latest checkpoint where it is resumed.

    Returns:
        The run, notes on how it starts, whether it is resumed.
    """
    check_settings(config, rank_info)
    checkpoint = find_checkpoint(work_dir, config, resume=arguments.resume, overwrite=arguments.overwrite)
    if checkpoint is None:
        check_init_from(config)
    make_work_dir(work_dir)
    seed_process(config.seed, deterministic=arguments.deterministic)
    with main_first(rank_info):
        prepare_data(config, talk=rank_info.is_main)
        check_splits(config.data)
        index = open_split(config.data, config.data.train_split)
        loader, steps_per_epoch = make_training_loader(config, index, rank_info)
        open_split(config.data, config.data.val_split)  # what is wrong there must not wait for the first evaluation

    model = build_detector(config.model).to(rank_info.device)
    notes = []
    if checkpoint is None:
        notes += set_first_weights(model, config, index)
    if arguments.resume and checkpoint is None:
        notes.append(f"{work_dir} holds no {LATEST} to resume from: starting anew")
    freeze(model, config.training.freeze)
    total_steps = steps_per_epoch * config.training.epochs
    run = Run(
        config=config,
        rank_info=rank_info,
        work_dir=work_dir,
        model=model,
        optimizer=build_optimizer(model, config),
        ddp_model=wrap(model, rank_info),
        criterion=build_criterion(config, reduce_mean=reduce_mean, num_processes=rank_info.world_size),
        scaler=torch.amp.GradScaler(rank_info.device.type, enabled=config.training.precision == "fp16"),
        loader=loader,
        tables=Tables(config.data.root, config.data.version),
        steps_per_epoch=steps_per_epoch,
        last_step=min(total_steps, arguments.max_steps or total_steps),
    )
    if checkpoint is not None:
        run.step = restore(checkpoint, work_dir / LATEST, model, run.optimizer, run.scaler, total_steps=total_steps)
    elif arguments.overwrite and rank_info.is_main:
        remove_run(work_dir)
    return run, notes, checkpoint is not None


def train_epochs(run: Run, log: RunLog) -> bool:
    """Train, save and evaluate until the last step; False where a signal stopped the run."""
    with log.progress("train", run.total_steps, run.step) as progress:
        while run.step < run.last_step:
            is_stopped = train_epoch(run, log, progress)
            is_last = is_stopped or run.step == run.last_step
            if is_last or run.step // run.steps_per_epoch % run.config.training.save_every == 0:
                save_run(run)
            if is_stopped:
                return False
            evaluate_epoch(run, log)
    return True


def train_epoch(run: Run, log: RunLog, progress: Progress) -> bool:
    """The steps that are left of the current epoch; True where a signal stopped the run."""
    epoch, first = divmod(run.step, run.steps_per_epoch)
    run.loader.set_epoch(epoch, first)
    with stop_signals() as stop:
        clock = progress.restart_clock()
        for batch in islice(run.loader, run.steps_per_epoch - first):
            data_time = time.perf_counter() - clock
            metrics = train_step(run, batch)
            step_time = time.perf_counter() - clock
            if run.step % run.config.training.log_every == 0 or run.step == run.total_steps:
                log_step(run, log, metrics | {"data_time": data_time, "step_time": step_time})
            progress.advance(loss=metrics["loss"], epoch=run.step / run.steps_per_epoch, lr=metrics["lr"])
            if any_process(stop.is_set, run.rank_info.device):
                return True
            if run.step == run.last_step:
                break
            clock = time.perf_counter()
    return False


def train_step(run: Run, batch: Batch) -> dict[str, Tensor | float]:
    """One optimizer step; returns the loss, its terms, metrics of AQR, the gradient's norm and the learning rate."""
    training = run.config.training
    set_training_mode(run.model, (*training.freeze, *training.norm_eval))
    set_rates(run)
    batch = batch.to(run.rank_info.device, non_blocking=True)
    terms, aqr_metrics = compute_losses(run, batch)
    loss = total_loss(terms)
    if not math.isfinite(loss.item()):
        shown = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
        raise TrainingStopped(f"step {run.step}: the loss is {loss.item()}; samples {', '.join(batch.tokens)}; {shown}")
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip)
    run.scaler.step(run.optimizer)
    run.model.clamp_parameters()
    run.scaler.update()
    run.step += 1
    terms = {"loss": loss.detach()} | {name: value.detach() for name, value in terms.items()} | aqr_metrics
    return terms | {"grad_norm": grad_norm, "lr": run.optimizer.param_groups[0]["lr"]}


def save_run(run: Run) -> None:
    """Write the checkpoints of the current step; the main process does."""
    if run.rank_info.is_main:
        save(run.work_dir, run.config, run.model, run.optimizer, run.scaler, run.step, run.steps_per_epoch)


def evaluate_epoch(run: Run, log: RunLog) -> None:
    """Evaluate where an evaluation is due after this step and the log has none: also after a stop in the middle of one.

    Trouble with the ground truth or the disk is logged, and the run continues: the weights are safe.
    """
    training = run.config.training
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    is_due = rest == 0 and (epoch % training.eval_every == 0 or epoch == training.epochs)
    if is_due and run.rank_info.is_main:
        is_due = not any(line["kind"] == "eval" and line["step"] == run.step for line in read_log(log.path))
    if not any_process(is_due and run.rank_info.is_main, run.rank_info.device):
        return
    share_buffers(run.model)
    try:
        folder = run.work_dir / "eval" / f"epoch_{epoch}"
        metrics = evaluate_split(
            run.model, run.config, run.config.data.val_split, run.rank_info, folder, log, run.tables
        )
    except EvaluationError as error:
        log.print(f"epoch {epoch} could not be evaluated: {error}")
        log.record("eval", run.step, epoch=epoch, error=str(error))
        return
    if metrics is not None:
        log.record("eval", run.step, epoch=epoch, **metrics.scalars())
        log.print(format_table(metrics))


def log_step(run: Run, log: RunLog, metrics: dict[str, Tensor | float]) -> None:
    """One line of the log; tensors are averaged over the processes."""
    tensors = {name: value.double() for name, value in metrics.items() if isinstance(value, Tensor)}
    means = reduce_mean(torch.stack(list(tensors.values()))).tolist()
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    values = metrics | dict(zip(tensors, means, strict=True)) | {"memory_gib": memory}
    log.record("train", run.step, epoch=run.step / run.steps_per_epoch, **values)


def describe(run: Run, log: RunLog) -> None:
    """Tell what is about to happen, and keep the resolved configuration."""
    config, rank_info = run.config, run.rank_info
    if rank_info.is_main:
        (run.work_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    log.print(
        f"{config.name}: {count_parameters(run.model) / 1e6:.1f} M parameters, "
        f"{rank_info.world_size} x {rank_info.device.type}, {config.training.precision}, "
        f"{config.training.epochs} epochs of {run.steps_per_epoch} steps, results in {run.work_dir}"
    )
    if run.model.aqr is not None:
        log.print(run.model.aqr.describe(rank_info.device))
    if run.step:
        log.print(f"resuming after step {run.step}")


def resume_hint(work_dir: Path) -> str:
    """How to resume, for the end of a sentence."""
    return f"resume with --resume --work-dir {work_dir}"


if __name__ == "__main__":
    sys.exit(main())
