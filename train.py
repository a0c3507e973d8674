"""Train a detector, evaluate it, draw what it sees.

    python train.py configs/synthetic_tiny.yaml
    python train.py configs/cmt_r50_800x320.yaml --set data.root=/data/nuscenes training.batch_size=8
    torchrun --nproc_per_node=8 --max-restarts=3 train.py configs/cmt_r50_800x320.yaml --work-dir runs/r50
    python train.py configs/cmt_r50_800x320.yaml --work-dir runs/r50 --resume

Results go to the work dir (runs/<name of the configuration>): config.yaml, log.jsonl, tensorboard/, latest.pt,
epoch_*.pt and, for every evaluation, eval/epoch_N/ with submission.json, metrics.json and pictures/. report.html shows
it all in a browser: the frames of the last evaluation, tables of scores, curves.
docs/architecture.md explains the parts.
"""

import sys

from cmt_aqr.command_line import parse_train_arguments

if __name__ == "__main__":
    parse_train_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds

import argparse
import math
import time
import traceback
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.build import check_splits, data_root, open_split
from cmt_aqr.config import Config, load_config, naming_source
from cmt_aqr.data.loader import explain_killed_worker
from cmt_aqr.data.sample import Batch
from cmt_aqr.devices import HostCopy
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.evaluation.nuscenes_eval import format_table
from cmt_aqr.jobs import evaluate_split, prepare_data
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.losses.matcher import ElsewhereError, NonFiniteError
from cmt_aqr.memory import explain_out_of_memory, keep_freed_memory, training_advice
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.probe import log_probe
from cmt_aqr.progress import phase
from cmt_aqr.replay import replay, stop_at_failed_step
from cmt_aqr.run import (
    Run,
    StepRecord,
    build_run,
    check_init_from,
    check_settings,
    compute_losses,
    make_training_loader,
    resume_hint,
    set_first_weights,
    set_rates,
    split_batch,
)
from cmt_aqr.run_page import keep_page
from cmt_aqr.run_report import describe, describe_results, log_step
from cmt_aqr.training.distributed import (
    RankInfo,
    any_process,
    gradient_sync,
    is_lost_connection,
    is_restart,
    main_first,
    process_group,
    share_buffers,
)
from cmt_aqr.training.logs import Progress, RunLog, read_log
from cmt_aqr.training.optim import set_training_mode, step_if_finite
from cmt_aqr.training.profiling import profiled_steps
from cmt_aqr.training.run_folder import (
    LATEST,
    find_checkpoint,
    make_work_dir,
    remove_run,
    restore,
    save,
)
from cmt_aqr.training.seeding import seed_process
from cmt_aqr.training.signals import StopFlag, stop_signals
from cmt_aqr.training.work_dir_lock import work_dir_lock

# A gradient that overflows although the scale is lowered to less is not a matter of half precision.
SMALLEST_SCALE = 2.0**-11


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_train_arguments(__doc__)
    if is_restart():
        arguments.resume, arguments.overwrite = True, False

    def run() -> int:
        with stop_signals() as stop:
            config = load_config(arguments.config, arguments.set)
            work_dir = arguments.work_dir or Path("runs") / config.name
            with process_group(arguments.device, advice=resume_hint(work_dir)) as rank_info:
                with naming_source(arguments.config, arguments.set):
                    check_settings(config, rank_info)
                if arguments.replay is not None:
                    replay(build_run(config, rank_info, work_dir), arguments.replay)
                advice = partial(training_advice, config, rank_info.world_size, work_dir)
                if rank_info.device.type == "cpu":
                    keep_freed_memory()
                with explain_out_of_memory(advice):
                    return train(config, rank_info, work_dir, arguments, stop)

    return report_errors(run)


def train(config: Config, rank_info: RankInfo, work_dir: Path, arguments: argparse.Namespace, stop: StopFlag) -> int:
    """Set up, run the epochs that are left, finish; returns the exit status."""
    if arguments.overwrite or not (work_dir / LATEST).exists():
        check_init_from(config)
    with main_first(rank_info):
        if config.data.synthetic is None:
            data_root(config.data)  # before the work dir appears
    make_work_dir(work_dir)
    with ExitStack() as resources:
        with main_first(rank_info):
            if rank_info.is_main:
                resources.enter_context(work_dir_lock(work_dir))
        try:
            run, notes = set_up(config, rank_info, work_dir, arguments)
        except KeyboardInterrupt:
            if rank_info.is_main:
                print("stopped before the first step; nothing is lost, start again with the same command", flush=True)
            raise
        log = resources.enter_context(RunLog(work_dir, rank_info.is_main, resume_step=run.step or None))
        describe(run, log, notes)
        if arguments.profile and rank_info.is_main:
            run.after_step = resources.enter_context(profiled_steps(work_dir / "profile", log.print))
        with stop.deferred(), explain_killed_worker(f"training.batch_size; {resume_hint(work_dir)}"):
            is_stopped = train_epochs(run, log, stop)
        if is_stopped:
            log.print(f"stopped after step {run.step}; {resume_hint(work_dir)}")
            return 130
        if run.step < run.total_steps:
            log.print(f"stopped after step {run.step} (--max-steps); {resume_hint(work_dir)}")
        else:
            log.print(describe_results(run, log))
    return 0


def set_up(config: Config, rank_info: RankInfo, work_dir: Path, arguments: argparse.Namespace) -> tuple[Run, list[str]]:
    """Everything a run needs, restored from the latest checkpoint where it is resumed; and notes on how it starts."""
    checkpoint = find_checkpoint(work_dir, config, resume=arguments.resume, overwrite=arguments.overwrite)
    seed_process(config.seed, deterministic=arguments.deterministic)
    with main_first(rank_info):
        prepare_data(config, verbose=rank_info.is_main)
        check_splits(config.data)
        tables = Tables(config.data.root, config.data.version)
        index = open_split(config.data, config.data.train_split, tables)
        loader, steps_per_epoch = make_training_loader(config, index, rank_info)
        # What is wrong there must not wait for the first evaluation.
        open_split(config.data, config.data.val_split, tables)

    run = build_run(config, rank_info, work_dir)
    run.tables, run.loader, run.steps_per_epoch = tables, loader, steps_per_epoch
    run.last_step = min(run.total_steps, arguments.max_steps or run.total_steps)
    if checkpoint is not None:
        run.step = run.saved_step = restore(
            checkpoint,
            work_dir / LATEST,
            run.model,
            run.optimizer,
            run.scaler,
            run.average,
            total_steps=run.total_steps,
        )
        return run, []
    notes = set_first_weights(run.model, config, index)
    if arguments.resume:
        notes.append(f"{work_dir} holds no {LATEST} to resume from: starting anew")
    if arguments.overwrite and rank_info.is_main:
        remove_run(work_dir)
    return run, notes


def train_epochs(run: Run, log: RunLog, stop: StopFlag) -> bool:
    """Train, save and evaluate until the last step; True where a signal stopped the run."""
    if run.step:
        evaluate_epoch(run, log, stop)  # where the run was stopped in the middle of one
    with log.progress("train", run.total_steps, run.step) as progress:
        while run.step < run.last_step:
            is_stopped = train_epoch(run, log, progress, stop)
            log_probe(run, log)
            is_last = is_stopped or run.step == run.last_step
            is_saved = run.step // run.steps_per_epoch % run.config.training.save_every == 0
            if is_last or is_saved or is_evaluation_epoch(run):
                save_run(run)
            if is_stopped:
                return True
            evaluate_epoch(run, log, stop)
    return False


def train_epoch(run: Run, log: RunLog, progress: Progress, stop: StopFlag) -> bool:
    """The steps that are left of the current epoch; True where a signal stopped the run."""
    epoch, first_step = divmod(run.step, run.steps_per_epoch)
    run.loader.set_epoch(epoch, first_step)
    clock = progress.restart_clock()
    losses = []
    with ExitStack() as first:
        if progress.is_first:
            first.enter_context(phase("first step (starts the data workers, compiles)"))
        for batch in islice(run.loader, run.steps_per_epoch - first_step):
            data_time = time.perf_counter() - clock
            metrics = train_step(run, batch)
            step_time = time.perf_counter() - clock
            first.close()
            run.after_step()
            if run.step % run.config.training.log_every == 0 or run.step == run.total_steps:
                check_last_step(run)
                log_step(run, log, metrics | {"data_time": data_time, "step_time": step_time})
            progress.advance(loss=run.loss, epoch=run.step / run.steps_per_epoch, lr=metrics["lr"])
            losses.append(metrics["loss"])
            if any_process(stop.is_set):
                check_last_step(run)
                return True
            if run.step == run.last_step:
                break
            clock = time.perf_counter()
    check_last_step(run)
    mean_loss = torch.stack(losses).mean().item()
    title = f"epoch {epoch + 1}/{run.config.training.epochs}"
    log.print(f"{progress.line(title, loss=mean_loss, lr=metrics['lr'])} of training alone")
    return False


def train_step(run: Run, batch: Batch) -> dict[str, Tensor | float]:
    """One optimizer step; returns the loss, its terms, metrics of AQR, the gradient's norm and the learning rate.

    Where the loss or the gradient is not finite the device leaves the weights as they are. The host learns it at once
    or, with ``run.checks_late``, in the next step, before that one is applied.

    Raises:
        TrainingStopped: the loss or the gradient is not finite; the weights are those before that step.
    """
    training = run.config.training
    set_training_mode(run.model, (*training.freeze, *training.norm_eval))
    set_rates(run)
    run.optimizer.zero_grad(set_to_none=True)
    metrics = forward_backward(run, batch)
    check_last_step(run)
    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip)
    step_if_finite(run.optimizer, run.scaler, grad_norm)
    run.scaler.update()
    run.model.clamp_parameters()
    if run.average is not None:
        run.average.update_parameters(run.model)

    terms = {name: value for name, value in metrics.items() if "loss_" in name}
    run.unchecked = StepRecord(run.step, batch, terms, HostCopy(metrics["loss"], grad_norm))
    run.step += 1
    if not run.checks_late:
        check_last_step(run)
    return metrics | {"grad_norm": grad_norm, "lr": run.optimizer.param_groups[0]["lr"]}


def check_last_step(run: Run) -> None:
    """Find out whether the last step was finite, so applied; to be called before anything is logged or saved.

    Raises:
        TrainingStopped: it was not, and not for the range of half precision.
    """
    record, run.unchecked = run.unchecked, None
    if record is None:
        return
    run.loss, norm = (number.item() for number in record.numbers.wait())
    if math.isfinite(norm):
        return
    # The norm, so this too, is the same in all processes.
    reason = None if math.isfinite(run.loss) else f"the loss is {run.loss}"
    if not any_process(reason is not None):
        # The scaler expects such gradients: it skips the step and lowers the scale.
        if run.scaler.is_enabled() and run.scaler.get_scale() >= SMALLEST_SCALE:
            run.skipped_steps += 1
            return
        reason = f"the gradient norm is {norm}"
    run.step = record.step
    stop_at_failed_step(run, record.batch, reason, record.terms)


def forward_backward(run: Run, batch: Batch) -> dict[str, Tensor]:
    """The gradient of this process's share of a step; returns the loss, its terms and metrics of AQR.

    A loss that is not finite makes the whole gradient NaN, in all processes.

    Raises:
        TrainingStopped: the matching failed, for values that are not finite.
    """
    means: dict[str, Tensor] = {}
    parts = split_batch(run, batch)
    for part in parts:
        with gradient_sync(run.ddp_model, is_last=part is parts[-1]):
            try:
                terms, aqr_metrics = compute_losses(run, part)
            except NonFiniteError as error:  # in all processes
                check_last_step(run)
                stop_at_failed_step(run, batch, None if isinstance(error, ElsewhereError) else str(error), {})
            loss = total_loss(terms)
            one_or_nan = torch.where(loss.isfinite(), 1.0, math.nan)
            run.scaler.scale(loss * one_or_nan / len(parts)).backward()
        values = {"loss": loss} | terms | aqr_metrics
        means = {name: means.get(name, 0) + value.detach() / len(parts) for name, value in values.items()}
    return means


def save_run(run: Run) -> None:
    """Write the checkpoints of the current step; what is not finite is refused. The main process does it."""
    if run.rank_info.is_main:
        average = None if run.average is None else run.average.module
        save(run.work_dir, run.config, run.model, run.optimizer, run.scaler, run.step, run.steps_per_epoch, average)
    run.saved_step = run.step


def is_evaluation_epoch(run: Run) -> bool:
    """Whether the current step ends an epoch after which the model is evaluated."""
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    training = run.config.training
    return rest == 0 and (epoch % training.eval_every == 0 or epoch == training.epochs)


def evaluate_epoch(run: Run, log: RunLog, stop: StopFlag) -> None:
    """Evaluate where an evaluation is due after this step and the log has none: also after a stop in the middle of one.

    Whatever goes wrong is logged, and the training continues.
    """
    is_due = is_evaluation_epoch(run)
    if is_due and run.rank_info.is_main:
        is_due = not any(line["kind"] == "eval" and line["step"] == run.step for line in read_log(log.path))
    if not any_process(is_due and run.rank_info.is_main):
        return
    epoch = run.step // run.steps_per_epoch
    share_buffers(run.evaluated)
    try:
        with stop.immediate():
            folder = run.work_dir / "eval" / f"epoch_{epoch}"
            split = run.config.data.val_split
            metrics = evaluate_split(run.evaluated, run.config, split, run.rank_info, folder, log, run.tables)
    except KeyboardInterrupt:
        log.print(f"stopped in the evaluation after step {run.step}, which is saved; {resume_hint(run.work_dir)}")
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        if not isinstance(error, UserError | OSError):
            log.print(traceback.format_exc())
        log.print(f"epoch {epoch} could not be evaluated: {error}; the training continues")
        log.record("eval", run.step, epoch=epoch, error=str(error))
        return
    if metrics is not None:
        log.record("eval", run.step, epoch=epoch, **metrics.scalars())
        log.print(format_table(metrics))
    keep_page(run.work_dir, run.config.name, log)


if __name__ == "__main__":
    sys.exit(main())
