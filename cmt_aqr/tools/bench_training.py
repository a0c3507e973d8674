"""Training steps and the loader: time, samples a second, busy share, memory."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn

from cmt_aqr.build import open_split
from cmt_aqr.config import Config
from cmt_aqr.data.sample import Batch
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.run import Run, build_optimizer, build_run, compute_losses, make_training_loader, set_rates, split_batch
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_measure import describe_machine, measure, number
from cmt_aqr.tools.bench_original import in_original_manner
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.optim import set_training_mode

# Steps of the schedule: the learning rate must be one of a run, however few steps are measured.
NUM_STEPS = 10_000
PARTS = ("batch to the device, denoising queries", "forward", "matching and loss", "backward, clipping", "optimizer")


def training_tables(
    config: Config, device: torch.device, *, cloud: str | None, batch_sizes: tuple[int, ...], repeats: int
) -> Iterator[str]:
    """What was measured on, then a table of whole steps and one of their parts for each batch size, as Markdown."""
    yield f"{config.name}, {describe_machine(device)}, {config.training.precision}\n"
    for batch_size in batch_sizes:
        batch = made_up_batch(config, batch_size, cloud=cloud)
        batch = batch.pin_memory() if device.type == "cuda" else batch
        yield step_table(config, device, batch, repeats) + "\n"


def step_table(config: Config, device: torch.device, batch: Batch, repeats: int) -> str:
    """A line for each way to train, with the first step from cold, then the parts of our step."""
    lines = [
        f"batch {len(batch)}",
        "",
        "| | first step, s | median, ms | p99, ms | samples/s | GPU busy, ms | peak, MiB | loss of the last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts: dict[str, dict[str, float]] = {}
    for name, make, is_compiled in ways(config, device):
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder:
            run = make(with_compile(config, is_compiled), device, Path(folder))
            step = TrainingStep(run, batch)
            start = time.perf_counter()
            step()  # which waits for its loss
            first = time.perf_counter() - start
            measured = measure(step, device, repeats=repeats)
            cells = [number(first), number(measured.median), number(measured.p99)]
            cells += [number(1e3 * len(batch) / measured.median), number(measured.busy), number(measured.peak, 0)]
            lines.append(f"| {name} | {' | '.join(cells)} | {step.loss:.4f} |")
            if make is make_run:
                parts[name] = part_times(step, device, repeats)
    lines += [
        "",
        f"| part of a step | {' | '.join(f'{name}, ms' for name in parts)} |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for part in PARTS:
        lines.append(f"| {part} | {' | '.join(number(times[part]) for times in parts.values())} |")
    return "\n".join(lines)


def ways(config: Config, device: torch.device) -> list[tuple[str, Callable[[Config, torch.device, Path], Run], bool]]:
    """Name of each way, what makes its run, and whether it is compiled: on a CPU only if the configuration says so."""
    rows = [("ours, eager", make_run, False), ("original's manner", make_original_run, False)]
    if device.type == "cuda" or config.training.compile is True:
        rows.insert(0, ("ours, compiled", make_run, True))
    return rows


def with_compile(config: Config, is_compiled: bool) -> Config:
    """The configuration with `training.compile`."""
    return replace(config, training=replace(config.training, compile=is_compiled))


def make_run(config: Config, device: torch.device, work_dir: Path) -> Run:
    """A run as train.py makes it, without data."""
    torch.manual_seed(config.seed)
    run = build_run(config, RankInfo(0, 1, device), work_dir)
    run.steps_per_epoch = NUM_STEPS // config.training.epochs + 1
    return run


def make_original_run(config: Config, device: torch.device, work_dir: Path) -> Run:
    """The same weights with a dense mask in every layer, and spconv where it is installed."""
    run = make_run(config, device, work_dir)
    model = in_original_manner(run.model, with_aqr=run.model.aqr is not None)
    return replace(run, model=model, ddp_model=model, optimizer=build_optimizer(model, run.config))


class TrainingStep:
    """The step of train.py on one batch, again and again; ``loss`` is that of the last step."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.run, self.batch = run, batch
        self.loss = float("nan")

    def __call__(self) -> None:
        """One step; the next one belongs to the next step of the schedule."""
        run, training = self.run, self.run.config.training
        set_training_mode(run.model, (*training.freeze, *training.norm_eval))
        set_rates(run)
        run.optimizer.zero_grad(set_to_none=True)
        parts = split_batch(run, self.batch)
        for part in parts:
            loss = total_loss(compute_losses(run, part)[0])
            run.scaler.scale(loss / len(parts)).backward()
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.model.clamp_parameters()
        run.step += 1
        self.loss = loss.item()


def part_times(step: TrainingStep, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of the parts of a step; the GPU is waited for at their ends, so their sum is more than it."""
    model, criterion, optimizer = step.run.ddp_model, step.run.criterion, step.run.optimizer
    stamps: list[float] = []

    def stamp(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())

    hooks = [
        model.register_forward_pre_hook(stamp),
        model.register_forward_hook(stamp),
        criterion.register_forward_hook(stamp),
        optimizer.register_step_pre_hook(stamp),
    ]
    durations = []
    for _ in range(repeats):
        stamps.clear()
        stamp()
        step()
        stamp()
        durations.append([1e3 * (end - start) for start, end in pairwise(stamps)])
    for hook in hooks:
        hook.remove()
    return {name: statistics.median(times) for name, times in zip(PARTS, zip(*durations, strict=True), strict=True)}


def loader_table(config: Config, *, workers: tuple[int, ...], num_batches: int) -> str:
    """Frames a second that the training loader yields with so many workers, once its first batch is there."""
    index = open_split(config.data, config.data.train_split)
    lines = [
        f"{config.name}: {len(index)} frames, batches of {config.training.batch_size}, {os.cpu_count()} CPU cores",
        "",
        "| workers | first batch, s | frames/s | ms a frame and worker |",
        "|---|---|---|---|",
    ]
    for count in workers:
        one = replace(config, data=replace(config.data, workers=count))
        loader, _ = make_training_loader(one, index, RankInfo(0, 1, torch.device("cpu")))
        start = time.perf_counter()
        batches = islice(loader, num_batches + 1)
        next(batches)
        first = time.perf_counter()
        frames = sum(len(batch) for batch in batches)
        duration = time.perf_counter() - first
        each = number(1e3 * duration / frames * max(1, count))
        lines.append(f"| {count} | {number(first - start)} | {number(frames / duration)} | {each} |")
    return "\n".join(lines)
