"""Wall time, busy time of the GPU and peak memory of a function that is called repeatedly."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MEBIBYTE = 2**20
WARM_UP_CALLS = 3
# Calls that are profiled for the busy time: the profiler slows the host, so they are not timed.
PROFILED_CALLS = 5


@dataclass(frozen=True)
class Measured:
    """Milliseconds of each call; on a GPU also ``busy`` ms of a call, where profiled, and ``peak`` MiB allocated."""

    median: float
    p99: float
    busy: float | None
    peak: float | None


def measure(
    call: Callable[[], object], device: torch.device, *, repeats: int, profiled: bool, waits: bool = True
) -> Measured:
    """Wall time of calls; on a GPU also its busy time and peak memory.

    Args:
        profiled: whether a few more calls are profiled for the busy time.
        waits: True: a call ends when the GPU has finished; False: when it returns, for calls that wait for the GPU
            themselves.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if waits:
            _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    _wait(device)
    peak = torch.cuda.max_memory_allocated(device) / MEBIBYTE if device.type == "cuda" else None
    times.sort()
    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
    busy = busy_time(call, device) if profiled and device.type == "cuda" else None
    return Measured(statistics.median(times), p99, busy, peak)


def busy_time(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call in which the GPU computes or copies on at least one stream."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize(device)
    spans = [event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return covered([(span.start, span.end) for span in spans]) / 1e3 / PROFILED_CALLS


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def describe_machine(device: torch.device) -> str:
    """Hardware and version, for the line above a table."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {os.uname().machine}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def number(value: float | None, digits: int = 1) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
