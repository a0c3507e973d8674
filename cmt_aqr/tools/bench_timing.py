"""CUDA graphs, GPU time and peak memory of a call: what the benchmarks share. All of it needs a CUDA GPU."""

import statistics
from collections.abc import Callable

import torch

MEBIBYTE = 2**20
WARM_UP = 3


def warm_up(call: Callable[[], object]) -> None:
    """Run a call a few times on another stream, as CUDA graphs require before their capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(call: Callable[[], object], *, inner: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``inner`` calls, captured after a warm-up; RuntimeError for a call that cannot be captured."""
    warm_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return graph


def gpu_time(call: Callable[[], object], *, inner: int = 10, repeats: int = 10) -> float:
    """Median microseconds on the GPU, from a CUDA graph of ``inner`` calls; from plain calls where capture fails."""

    def plain() -> None:
        for _ in range(inner):
            call()

    try:
        run = capture(call, inner=inner).replay
    except RuntimeError:
        torch.cuda.synchronize()
        run = plain
    return statistics.median(event_time(run) for _ in range(repeats)) / inner


def event_time(call: Callable[[], object]) -> float:
    """Microseconds on the GPU from the start to the end of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)


def extra_memory(call: Callable[[], object]) -> float:
    """Peak MiB during a call beyond what was allocated before, its results included. The call runs twice."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
