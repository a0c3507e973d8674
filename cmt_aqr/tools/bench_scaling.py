"""How the cost of the attention with the bias grows with each size, and that of the LiDAR branch with the points."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cmt_aqr.build import build_lidar_branch
from cmt_aqr.config import Config
from cmt_aqr.models.fixed_lidar import encode_points_fixed, measure_sizes
from cmt_aqr.models.voxels import pad_points
from cmt_aqr.progress import phase
from cmt_aqr.tools.bench_attention import BASE, DeviceError, make_problem, ways
from cmt_aqr.tools.bench_frames import random_points
from cmt_aqr.tools.bench_measure import number
from cmt_aqr.tools.bench_shapes import SCALING, AttentionShape
from cmt_aqr.tools.bench_timing import extra_memory, gpu_time

OURS = "**flex (ours)**"
NUM_POINTS = (50_000, 100_000, 200_000, 350_000, 1_000_000)


@dataclass
class Cost:
    """Microseconds and MiB at one size; ``plain``: FlashAttention-2 without a bias, forward and forward + backward."""

    size: int
    forward: float
    both: float
    memory: float
    plain: tuple[float, float] | None = None


def scaling_lines(config: Config, axes: tuple[str, ...]) -> Iterator[str]:
    """The machine, then one table for each axis, as Markdown; each line is yielded as soon as it is known.

    Args:
        config: of the LiDAR branch.
        axes: of `SCALING`, or ``points``.
    """
    if not torch.cuda.is_available():
        raise DeviceError("bench scaling needs a CUDA GPU, and there is none")
    yield f"{torch.cuda.get_device_name()}, torch {torch.__version__}: the r50 preset, of which one size grows\n"
    for axis in axes:
        yield from table(axis, point_costs(config) if axis == "points" else attention_costs(axis))
        yield ""


def attention_costs(axis: str) -> Iterator[Cost]:
    """Our attention and the plain one at every size of an axis."""
    for size, shape in SCALING[axis].items():
        with phase(f"{axis}, {size}: compiling and measuring"):
            cost = attention_cost(size, shape)
        yield cost


def attention_cost(size: int, shape: AttentionShape) -> Cost:
    """Our attention and the plain one at a shape."""
    torch._dynamo.reset()
    problem = make_problem(shape)
    functions = {name: (function, leaves) for name, function, leaves, _ in ways(problem)}

    def times(name: str) -> tuple[float, float, float]:
        function, leaves = functions[name]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function()

        def both() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(function(), leaves, problem.grad_out)

        return gpu_time(forward), gpu_time(both), extra_memory(both)

    forward, both, memory = times(OURS)
    return Cost(size, forward, both, memory, times(BASE)[:2])


def point_costs(config: Config) -> Iterator[Cost]:
    """Points to the BEV map at fixed sizes, float16, as a CUDA graph."""
    torch.manual_seed(0)
    branch = build_lidar_branch(config.model.lidar, config.model.point_range).cuda().eval()
    branch.encoder.precision = torch.float16
    for count in NUM_POINTS:
        cloud = random_points(count, config.model.point_range).cuda()
        points = torch.empty(1, count, cloud.shape[1], device="cuda")
        pad_points([cloud], points)
        with torch.inference_mode():
            sizes = measure_sizes(branch, points)

            def run(points=points, sizes=sizes) -> torch.Tensor:
                return encode_points_fixed(branch, points, sizes)[0]

            with phase(f"{count} points"):
                cost = Cost(count, gpu_time(run, inner=1), math.nan, extra_memory(run))
        yield cost


def table(axis: str, costs: Iterable[Cost]) -> Iterator[str]:
    """A line for each size; the exponent is that of a power law through this line and the one before: 1 is linear."""
    yield f"| {axis} | forward, us | exponent | to plain | forward + backward, us | exponent | to plain | memory, MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    before = None
    for cost in costs:
        cells = [f"{cost.size:,}".replace(",", " ")]
        for name, index in (("forward", 0), ("both", 1)):
            value = getattr(cost, name)
            exponent = None if before is None else growth(before.size, cost.size, getattr(before, name), value)
            ratio = None if cost.plain is None else value / cost.plain[index]
            cells += [_cell(value, 0), _cell(exponent, 2), _cell(ratio, 2)]
        yield f"| {' | '.join(cells)} | {number(cost.memory, 0)} |"
        before = cost


def growth(size: float, larger: float, time: float, longer: float) -> float:
    """Exponent p of ``time ~ size ** p`` through two measurements."""
    return math.log(longer / time) / math.log(larger / size)


def _cell(value: float | None, digits: int) -> str:
    return number(None if value is None or math.isnan(value) else value, digits)
