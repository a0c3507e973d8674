"""``train.py --profile``: where the time of a training step goes, from a few steps of a real run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Steps that are left out (workers start, kernels compile), that warm the profiler up, and that are recorded.
SKIPPED, WARM_UP, RECORDED = 3, 1, 3
TRACE, TABLE = "trace.json.gz", "table.txt"
TABLE_ROWS = 15


@contextmanager
def profiled_steps(folder: Path, write_line: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Record some steps of a loop; hands out a function that is to be called after every step.

    Args:
        folder: gets trace.json.gz, for chrome://tracing or ui.perfetto.dev, and table.txt, the operators by their time.
        write_line: prints the table and where the trace is, or why there is none.
    """
    devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    needed = SKIPPED + WARM_UP + RECORDED

    def write(finished: profile) -> None:
        if finished.step_num < needed:
            return
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / TRACE))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=40)
        (folder / TABLE).write_text(table + "\n", encoding="utf-8")
        write_line(f"{table}\n--profile: {RECORDED} steps in {folder / TRACE}, this table in {folder / TABLE}")

    steps = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profile(activities=devices, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
    if profiler.step_num < needed:
        write_line(f"--profile: {profiler.step_num} steps were too few, it takes {needed} for a trace in {folder}")
