"""Training steps and the loader: time, samples a second, busy time of the GPU, memory."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn

from cmt_aqr.build import open_split
from cmt_aqr.config import Config
from cmt_aqr.data.sample import Batch
from cmt_aqr.devices import HostCopy
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.memory import keep_freed_memory
from cmt_aqr.progress import phase
from cmt_aqr.run import Run, build_optimizer, build_run, compute_losses, make_training_loader, set_rates, split_batch
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_measure import describe_machine, measure, number
from cmt_aqr.tools.bench_original import in_original_manner
from cmt_aqr.tools.bench_shapes import TRAINING_WAYS
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.optim import set_training_mode, step_if_finite

# Steps of the schedule: the learning rate must be that of a long run, however few steps are measured.
NUM_STEPS = 10_000
COLUMNS = (
    "first step, s",
    "median, ms",
    "p99, ms",
    "samples/s",
    "GPU busy, ms",
    "peak, MiB",
    "loss of the last step",
)
PARTS = ("batch to the device, denoising queries", "forward", "matching and loss", "backward, clipping", "optimizer")


@dataclass(frozen=True)
class TrainingOptions:
    """What is measured.

    Attributes:
        cloud: a LiDAR file (.bin) for made-up frames; None: a made-up scanner.
        repeats: timed steps.
        ways: of `TRAINING_WAYS`; None: all, the compiled one on a CPU only if the configuration says so.
        stages: whether the parts of a step are timed, too.
        profiled: whether some steps are profiled for the busy time of the GPU.
    """

    cloud: str | None
    batch_sizes: tuple[int, ...]
    repeats: int
    ways: tuple[str, ...] | None
    stages: bool
    profiled: bool


def training_lines(config: Config, device: torch.device, options: TrainingOptions) -> Iterator[str]:
    """The machine, then a table for each batch size, as Markdown; each line is yielded as soon as it is known."""
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    yield f"{config.name}, {describe_machine(device)}, {config.training.precision}\n"
    columns = [*COLUMNS, *(f"{part}, ms" for part in PARTS if options.stages)]
    for batch_size in options.batch_sizes:
        batch = made_up_batch(config, batch_size, cloud=options.cloud)
        batch = batch.pin_memory() if device.type == "cuda" else batch
        yield from (f"batch {batch_size}\n", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|")
        for way in options.ways or default_ways(config, device):
            torch._dynamo.reset()
            yield way_line(way, config, device, batch, options)
        yield ""


def default_ways(config: Config, device: torch.device) -> tuple[str, ...]:
    """All, the compiled one on a CPU only if the configuration says so."""
    is_compiled = device.type == "cuda" or config.training.compile is True
    return tuple(way for way in TRAINING_WAYS if way != "compiled" or is_compiled)


def way_line(way: str, config: Config, device: torch.device, batch: Batch, options: TrainingOptions) -> str:
    """The line of one way to train, with the time of its first step, which includes compilation."""
    title = f"{TRAINING_WAYS[way]}, batch {len(batch)}"
    with tempfile.TemporaryDirectory() as folder:
        with phase(f"{title}: first step, compiles where it is compiled"):
            make = make_original_run if way == "original" else make_run
            step = TrainingStep(make(with_compile(config, way == "compiled"), device, Path(folder)), batch)
            start = time.perf_counter()
            step()
            _ = step.loss  # waits for the GPU
            first = time.perf_counter() - start
        with phase(f"{title}: {options.repeats} steps"):
            measured = measure(step, device, repeats=options.repeats, profiled=options.profiled, waits=False)
        cells = [number(first), number(measured.median), number(measured.p99)]
        cells += [number(1e3 * len(batch) / measured.median), number(measured.busy), number(measured.peak, 0)]
        cells.append(f"{step.loss:.4f}")
        if options.stages:
            with phase(f"{title}: {options.repeats} steps in parts"):
                cells += map(number, part_times(step, device, options.repeats))
    return f"| {TRAINING_WAYS[way]} | {' | '.join(cells)} |"


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
    """The step of train.py, repeated on one batch; like that one, it does not wait for the device to finish."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.run, self.batch = run, batch
        self._loss: HostCopy | None = None

    @property
    def loss(self) -> float:
        """Loss of the last step; waits for the device."""
        return self._loss.wait()[0].item()

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
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip)
        step_if_finite(run.optimizer, run.scaler, norm)
        run.scaler.update()
        run.model.clamp_parameters()
        run.step += 1
        self._loss = HostCopy(loss)


def part_times(step: TrainingStep, device: torch.device, repeats: int) -> list[float]:
    """Median milliseconds of `PARTS`; each ends with a wait for the GPU, so their sum is more than a step."""
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
    return [statistics.median(times) for times in zip(*durations, strict=True)]


def loader_lines(config: Config, *, workers: tuple[int, ...], num_batches: int) -> Iterator[str]:
    """Frames a second of the training loader after its first batch, for several numbers of workers."""
    index = open_split(config.data, config.data.train_split)
    size = config.training.batch_size
    yield f"{config.name}: {len(index)} frames, batches of {size}, {os.cpu_count()} CPU cores\n"
    yield "| workers | first batch, s | frames/s | ms a frame and worker |"
    yield "|---|---|---|---|"
    for count in workers:
        one = replace(config, data=replace(config.data, workers=count))
        with phase(f"{num_batches} batches from {count} workers"):
            loader, _ = make_training_loader(one, index, RankInfo(0, 1, torch.device("cpu")))
            start = time.perf_counter()
            batches = islice(loader, num_batches + 1)
            next(batches)
            first = time.perf_counter()
            frames = sum(len(batch) for batch in batches)
            duration = time.perf_counter() - first
        each = number(1e3 * duration / frames * max(1, count))
        yield f"| {count} | {number(first - start)} | {number(frames / duration)} | {each} |"
