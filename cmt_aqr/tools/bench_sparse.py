"""Time and memory of the sparse encoder by both backends, and how far they are from float64 on the CPU."""

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmt_aqr.data.readers import read_points
from cmt_aqr.models import spconv_backend
from cmt_aqr.models.lidar import SparseEncoder
from cmt_aqr.models.sparse import Capacities
from cmt_aqr.models.voxels import VoxelBatch, pad_voxels, voxelize_batch
from cmt_aqr.progress import phase
from cmt_aqr.tools.bench_timing import capture, extra_memory

SHAPE = (41, 1024, 1024)
VOXELS = {"voxel_size": (0.1, 0.1, 0.2), "point_range": (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), "max_voxels": 120_000}
NUM_VOXELS = 113_000
SWEEPS, SWEEP_STEP = 10, 0.35  # a car at 7 m/s, 20 sweeps a second


@dataclass
class Row:
    """One line of the table: milliseconds and MiB; None: not measured."""

    name: str
    forward: float
    both: float | None = None
    memory: float | None = None
    memory_both: float | None = None
    error: float | None = None


def sparse_lines(path: str | None, *, batch_size: int, repeats: int, threads: int) -> Iterator[str]:
    """The machine, then tables of evaluation and training mode, as Markdown; each line as soon as it is known.

    Args:
        path: a LiDAR file of nuScenes (.bin), taken ten times with the step of a moving car; None: a random cloud.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    voxels = voxels_of_file(path, batch_size) if path else random_voxels(batch_size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.uname().machine}, {threads} thread(s)"
    yield f"{name}, torch {torch.__version__}, batch {batch_size}, {len(voxels.coords_bzyx)} voxels, grid {SHAPE}\n"
    for is_training in (False, True):
        yield "training mode\n" if is_training else "evaluation mode\n"
        yield "| | forward, ms | forward + backward, ms | memory, MiB: forward | both | error |"
        yield "|---|---|---|---|---|---|"
        for row in rows(device, voxels, is_training=is_training, repeats=repeats):
            times = " | ".join(_number(value, ".1f") for value in (row.forward, row.both))
            sizes = " | ".join(_number(value, ".0f") for value in (row.memory, row.memory_both))
            yield f"| {row.name} | {times} | {sizes} | {_number(row.error, '.1e')} |"
        yield ""


def voxels_of_file(path: str, batch_size: int) -> VoxelBatch:
    """Voxels of one LiDAR file, each frame the file ten times, a little further along x every time."""
    return voxelize_batch([ten_sweeps(read_points(Path(path)))] * batch_size, **VOXELS)


def ten_sweeps(points: Tensor) -> Tensor:
    """The same points ten times, a little further along x every time."""
    steps = torch.arange(SWEEPS).repeat_interleave(len(points))
    clouds = points.repeat(SWEEPS, 1)
    clouds[:, 0] += SWEEP_STEP * steps
    clouds[:, 4] = 0.05 * steps
    return clouds


def random_voxels(batch_size: int) -> VoxelBatch:
    """Voxels of a scanner with 32 beams on a plane with walls at random distances, ten sweeps a frame."""
    generator = torch.Generator().manual_seed(0)
    clouds = [ten_sweeps(random_cloud(generator)) for _ in range(batch_size)]
    return voxelize_batch(clouds, **VOXELS | {"max_voxels": NUM_VOXELS})


def random_cloud(generator: torch.Generator) -> Tensor:
    """Points (P, 5) of one sweep of a scanner with 32 beams on a plane, with walls at random distances."""
    elevation = torch.linspace(-30, 10, 32).deg2rad()[:, None]
    azimuth = torch.linspace(0, 360, 1084).deg2rad()
    walls = (torch.rand(100, generator=generator) * 70 + 5)[(azimuth * 15.9).long().clamp(max=99)]
    ground = torch.where(elevation < 0, 1.8 / (-elevation).clamp(min=1e-3).tan(), 1e3)
    distance = torch.minimum(ground, walls) + 0.03 * torch.randn(32, 1084, generator=generator)
    x, y, z = distance * azimuth.cos(), distance * azimuth.sin(), distance * elevation.tan()
    rest = torch.rand(2, 32, 1084, generator=generator)
    return torch.stack([x, y, z, *rest], dim=-1).flatten(0, 1)


def rows(device: torch.device, voxels: VoxelBatch, *, is_training: bool, repeats: int) -> Iterator[Row]:
    """Measure both backends in one mode."""
    torch.manual_seed(0)
    reference = SparseEncoder(in_channels=5, sparse_shape=SHAPE, backend="torch").train(is_training)
    with torch.no_grad(), phase("reference in float64"):
        expected = None if device.type == "cpu" else copy.deepcopy(reference).double()(voxels)
    on_device = voxels._replace(features=voxels.features.to(device), coords_bzyx=voxels.coords_bzyx.to(device))
    precisions = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for precision in precisions:
        for backend in ("spconv", "torch"):
            if backend == "spconv" and (precision == torch.bfloat16 or spconv_backend.import_error() is not None):
                continue
            encoder = copy.deepcopy(reference).to(device)
            encoder.backend, encoder.precision = backend, precision
            name = f"{backend}, {str(precision).removeprefix('torch.')}"
            with phase(name):
                row = measure(name, lambda encoder=encoder: encoder(on_device), encoder, expected, repeats)
            yield row
            if backend == "torch":
                yield from fixed_rows(name, encoder, on_device, expected, repeats)


def fixed_rows(
    name: str, encoder: SparseEncoder, voxels: VoxelBatch, expected: Tensor | None, repeats: int
) -> Iterator[Row]:
    """Fixed sizes with a quarter of headroom: launched kernel by kernel, and on a GPU as a CUDA graph."""
    padded = pad_voxels(voxels, VOXELS["max_voxels"] * voxels.batch_size)
    capacities = Capacities(encoder.measure_rows(voxels)).rows

    def run() -> Tensor:
        return encoder.encode_fixed(padded, capacities)[0]

    yield measure(f"{name}, fixed sizes", run, encoder, expected, repeats)
    if padded.features.is_cuda:
        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        for manner, call in (("", run), (", compiled", compiled)):
            with torch.no_grad():
                graph = capture(call)
            title = f"{name}, fixed sizes{manner}, CUDA graph"
            yield Row(title, median_time(graph.replay, repeats, on_gpu=True), error=error_of(call, expected))


def measure(name: str, run: Callable[[], Tensor], encoder: SparseEncoder, expected: Tensor | None, repeats: int) -> Row:
    """Time, peak memory beyond what was allocated before, and error of a call."""
    on_gpu = next(encoder.parameters()).is_cuda

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> None:
        encoder.zero_grad()
        run().square().mean().backward()

    row = Row(name, median_time(forward, repeats, on_gpu=on_gpu), median_time(both, repeats, on_gpu=on_gpu))
    if on_gpu:
        row.memory, row.memory_both = extra_memory(forward), extra_memory(both)
    row.error = error_of(run, expected)
    return row


@torch.no_grad()
def error_of(run: Callable[[], Tensor], expected: Tensor | None) -> float | None:
    """Largest difference from the expected map, relative to its largest value."""
    if expected is None:
        return None
    return ((run().cpu().double() - expected).abs().max() / expected.abs().max()).item()


def median_time(run: Callable[[], object], repeats: int, *, on_gpu: bool) -> float:
    """Milliseconds: median wall time including the wait for the GPU; on a CPU the least CPU time of this process."""
    clock = time.perf_counter if on_gpu else time.process_time
    times = []
    for _ in range(repeats + (3 if on_gpu else 0)):
        start = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - start))
    return statistics.median(times[3:]) if on_gpu else min(times)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
