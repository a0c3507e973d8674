"""Time, memory and error of attention with the bias, beside attention without it and beside other ways to add it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_aqr.aqr.lowrank import LowRankFactors, factored_attention, factorise
from cmt_aqr.attention import AttentionBias, QueryWindows, WindowSettings, bias_values
from cmt_aqr.attention.dense import dense_attention, dense_bias
from cmt_aqr.attention.flex.kernel import flex_attention_with_bias, plan
from cmt_aqr.attention.score_mod import attention_with_score_mod
from cmt_aqr.errors import UserError
from cmt_aqr.progress import phase
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from cmt_aqr.tools.bench_shapes import ATTENTION_SHAPES, AttentionShape
from cmt_aqr.tools.bench_timing import event_time, extra_memory, gpu_time

HEADS, HEAD_DIM = 8, 32
SCALE, MAX_BIAS = 2.5, 5.0
DTYPE = torch.bfloat16
ENERGIES = (0.90, 0.99)
BASE = "FlashAttention-2, no bias"


class DeviceError(UserError):
    """The machine has no GPU."""


@dataclass
class Problem:
    """Inputs of one shape: q (B, M, Q, D), k, v (B, M, K, D) in DTYPE; weights (B, Q, 2), scale (1,) float32.

    All of them are leaves of the backward pass.

    ``padded`` holds k and v padded with zeros to whole blocks, as the detector pads its tokens.
    """

    windows: QueryWindows
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    scale: Tensor
    grad_out: Tensor
    padded: tuple[Tensor, Tensor]

    def bias(self) -> AttentionBias:
        """The bias as a function of weights and scale."""
        return AttentionBias(self.windows, bias_values(self.weights, self.scale, MAX_BIAS))


@dataclass
class Row:
    """One line of the table: microseconds, MiB beyond the inputs at the peak, relative error; None: not measured."""

    name: str
    forward: float | None = None
    both: float | None = None
    memory: float | None = None
    memory_both: float | None = None
    error: float | None = None
    note: str = ""


def attention_lines(shapes: tuple[int, ...]) -> Iterator[str]:
    """The machine, then a table for every chosen shape, as Markdown; each line is yielded as soon as it is known."""
    if not torch.cuda.is_available():
        raise DeviceError("bench attention needs a CUDA GPU, and there is none")
    yield f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}, {HEADS} heads of {HEAD_DIM}\n"
    for index in shapes:
        yield from shape_lines(ATTENTION_SHAPES[index])


def shape_lines(shape: AttentionShape) -> Iterator[str]:
    """Measure every way on one shape."""
    torch._dynamo.reset()  # or the shapes before would count against the limit of recompilations
    yield f"{shape}\n"
    yield "| | forward, us | ratio | forward + backward, us | ratio | memory, MiB: forward | both | error |"
    yield "|---|---|---|---|---|---|---|---|"
    base = None
    for row in shape_rows(make_problem(shape)):
        base = base or row
        cells = [f"{row.name}{row.note}"]
        cells += [_number(row.forward), _ratio(row.forward, base.forward)]
        cells += [_number(row.both), _ratio(row.both, base.both), _number(row.memory), _number(row.memory_both)]
        cells.append("-" if row.error is None else f"{row.error:.1e}")
        yield "| " + " | ".join(cells) + " |"
    yield ""


def shape_rows(problem: Problem) -> Iterator[Row]:
    """All ways, the base first."""
    with phase("reference in float64"):
        reference = float64_output(problem)
    for way in ways(problem):
        with phase(way[0]):
            row = measure_row(*way, problem, reference)
        yield row
    yield from lowrank_rows(problem, reference)
    shared = gpu_time(lambda: plan(problem.windows))
    yield Row("flex: sorting and block ranges, once for all layers", forward=shared)


def make_problem(shape: AttentionShape) -> Problem:
    """Random content, windows from nuScenes' calibration; memory layout as after linear projections."""
    batch_size, num_queries = shape.batch_size, shape.num_queries
    layout = fusion_layout(shape.bev, shape.cameras, cell_size=shape.cell_size)
    windows = make_windows(
        layout,
        batch_size,
        num_queries,
        device="cuda",
        num_clusters=shape.clusters,
        settings=WindowSettings(dict(zip(("lidar", "camera"), shape.windows, strict=True))),
    )
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length: int, zeros: int = 0) -> Tensor:
        x = torch.randn(batch_size, length, HEADS, HEAD_DIM, device="cuda", generator=generator, dtype=DTYPE)
        return F.pad(x, (0, 0, 0, 0, 0, zeros)).transpose(1, 2).detach().requires_grad_()

    missing = layout.padded_length - layout.num_tokens
    padded = draw(layout.num_tokens, missing), draw(layout.num_tokens, missing)
    k, v = (x.detach()[:, :, : layout.num_tokens].transpose(1, 2).contiguous().transpose(1, 2) for x in padded)
    weights = torch.randn(batch_size, num_queries, 2, device="cuda", generator=generator).tanh()
    return Problem(
        windows=windows,
        q=draw(num_queries),
        k=k.requires_grad_(),
        v=v.requires_grad_(),
        weights=weights.requires_grad_(),
        scale=torch.full((1,), SCALE, device="cuda", requires_grad=True),
        grad_out=draw(num_queries).detach(),
        padded=padded,
    )


Way = tuple[str, Callable[[], Tensor], tuple[Tensor, ...], bool]


def ways(problem: Problem) -> list[Way]:
    """For each way: its name, function, leaves of the backward pass, and whether it adds the bias."""
    p = problem
    tokens, bias_leaves = (p.q, p.k, p.v), (p.weights, p.scale)
    schedule = plan(p.windows)

    @torch.compile(dynamic=False, fullgraph=True)
    def flex(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        bias = AttentionBias(p.windows, bias_values(weights, scale, MAX_BIAS))
        return flex_attention_with_bias(q, k, v, bias, schedule)[0]

    def score_mod(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        bias = AttentionBias(p.windows, bias_values(weights, scale, MAX_BIAS))
        return attention_with_score_mod(q, k, v, bias)[0]

    def plain(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tokens)

        return run

    def ours() -> Tensor:
        return flex(p.q, *p.padded, *bias_leaves)

    def ours_unpadded() -> Tensor:
        return flex(*tokens, *bias_leaves)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(*tokens, attn_mask=dense_bias(p.bias())[:, None].to(DTYPE))

    ready = dense_bias(p.bias())[:, None].detach().to(DTYPE)
    module = torch.nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True, device="cuda", dtype=DTYPE)
    merged = [x.detach().transpose(1, 2).flatten(2).requires_grad_() for x in tokens]

    def original() -> Tensor:
        mask = dense_bias(p.bias()).to(DTYPE).repeat_interleave(HEADS, dim=0)
        return module(*merged, attn_mask=mask, need_weights=False)[0]

    return [
        (BASE, plain(SDPBackend.FLASH_ATTENTION), tokens, False),
        ("cuDNN, no bias", plain(SDPBackend.CUDNN_ATTENTION), tokens, False),
        ("**flex (ours)**", ours, (p.q, *p.padded, *bias_leaves), True),
        ("flex (ours), tokens not padded", ours_unpadded, (*tokens, *bias_leaves), True),
        (
            "FlexAttention, plain score_mod",
            lambda: score_mod(*tokens, *bias_leaves),
            (*tokens, *bias_leaves),
            True,
        ),
        (
            "SDPA, dense mask, mask ready",
            lambda: F.scaled_dot_product_attention(*tokens, attn_mask=ready),
            tokens,
            True,
        ),
        ("SDPA, dense mask and its construction", masked, (*tokens, *bias_leaves), True),
        ("nn.MultiheadAttention, mask and projections", original, (*merged, *bias_leaves), False),
    ]


def measure_row(
    name: str,
    function: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    is_biased: bool,
    problem: Problem,
    reference: Tensor,
) -> Row:
    """Time, memory and error of one way; where the GPU cannot run it, a row that gives the reason."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function()

    def both() -> tuple[Tensor, ...]:
        out = function()
        grad = problem.grad_out
        return torch.autograd.grad(out, leaves, grad if grad.shape == out.shape else grad.transpose(1, 2).flatten(2))

    row = Row(name)
    try:
        if is_biased:
            row.error = relative_error(forward(), reference)
        row.forward, row.memory = gpu_time(forward), extra_memory(forward)
        row.both, row.memory_both = gpu_time(both), extra_memory(both)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        row.note = f" ({str(error).splitlines()[0][:60]})"
        torch.cuda.empty_cache()
    return row


def lowrank_rows(problem: Problem, reference: Tensor) -> Iterator[Row]:
    """Low-rank factors at both energies: their SVD, and the attention with them (forward only)."""
    bias = AttentionBias(problem.windows, problem.bias().values.detach())
    factorise(bias, ENERGIES[0])  # the first SVD initialises the library
    for energy in ENERGIES:
        svd = event_time(lambda energy=energy: factorise(bias, energy))
        factors = factorise(bias, energy)

        def forward(factors: LowRankFactors = factors) -> Tensor:
            with torch.no_grad():
                return factored_attention(problem.q, problem.k, problem.v, factors)[0]

        row = Row(f"low rank, {energy:.0%} energy: rank {factors.rank}; SVD {svd / 1e3:.0f} ms")
        row.error, row.forward, row.memory = (
            relative_error(forward(), reference),
            gpu_time(forward),
            extra_memory(forward),
        )
        yield row


def float64_output(problem: Problem) -> Tensor:
    """The dense evaluator in float64 on the same rounded inputs, one sample at a time, on the GPU."""
    with torch.no_grad():
        q, k, v = (x.detach().double() for x in (problem.q, problem.k, problem.v))
        return dense_attention(q, k, v, problem.bias(), query_chunk=64)[0]


def relative_error(out: Tensor, reference: Tensor) -> float:
    """max |out - reference| / max |reference|."""
    return ((out.double() - reference).abs().max() / reference.abs().max()).item()


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.0f}".replace(",", " ")


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"
