"""Memory that runs out, on a GPU or in the host, as one sentence that names the keys that help."""

import ctypes
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cmt_aqr.config import Config
from cmt_aqr.errors import UserError
from cmt_aqr.run import resume_hint
from cmt_aqr.training.run_folder import LATEST

# What PyTorch, cuBLAS and cuDNN say in a RuntimeError that is no torch.OutOfMemoryError.
ALLOCATION = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
TRIED = re.compile(r"tried to allocate ([0-9.]+ \w+)", re.IGNORECASE)
CAPACITY = re.compile(r"total capacity of ([0-9.]+ \w+)")

# Options of glibc's mallopt: allocations up to 32 MiB come from the heap, which grows in steps of 64 MiB and gives
# nothing back to the kernel before 2 GiB at its end are free.
MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD = (-3, 2**25), (-2, 2**26), (-1, 2**31 - 1)


class OutOfMemory(UserError):
    """There is not enough memory for what the configuration asks for."""


@contextmanager
def explain_out_of_memory(advice: Callable[[bool], str]) -> Iterator[None]:
    """Turn PyTorch's and numpy's errors about memory into a sentence.

    Args:
        advice: True where the host's memory is full, not a GPU's -> what to change and what to do next.

    Raises:
        OutOfMemory: where there was too little, how much was asked for, and the advice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or ALLOCATION.search(text)):
            raise
        on_host = isinstance(error, MemoryError) or "CPUAllocator" in text
        raise OutOfMemory(f"{_describe(text, on_host)}; {advice(on_host)}") from None


def _describe(text: str, on_host: bool) -> str:
    where = "the host" if on_host else "the GPU"
    tried, capacity = TRIED.search(text), CAPACITY.search(text)
    size = f" ({tried[1]} more were asked for{f', it has {capacity[1]}' if capacity else ''})" if tried else ""
    return f"{where} is out of memory{size}"


def training_advice(config: Config, world_size: int, work_dir: Path, on_host: bool) -> str:
    """What makes a training step smaller, and how to resume afterwards.

    Args:
        world_size: processes that share ``training.batch_size``.
        on_host: whether the host's memory is full, not a GPU's.
    """
    training, model = config.training, config.model
    share = training.batch_size // world_size
    parts = next((n for n in range(training.accumulation + 1, share + 1) if share % n == 0), None)
    changes = []
    if parts is not None:
        changes.append(f"training.accumulation={parts} (the same step in smaller parts)")
    if not model.activation_checkpointing:
        changes.append("model.activation_checkpointing=true")
    elif model.camera is not None and not model.camera.activation_checkpointing:
        changes.append("model.camera.activation_checkpointing=true")
    if share > 1:
        changes.append(f"training.batch_size below {training.batch_size} (in a new run)")
    elif training.precision == "fp32":
        changes.append("training.precision=bf16 (in a new run)")
    if on_host and config.data.workers:
        changes.append(f"data.workers below {config.data.workers}")
    is_saved = (work_dir / LATEST).exists()
    after = resume_hint(work_dir) if is_saved else "nothing was saved yet, start again with the same command"
    return f"{_one_of(changes) or 'use a smaller model'}; {after}"


def evaluation_advice(config: Config, on_host: bool) -> str:
    """What makes an evaluation smaller."""
    evaluation = config.evaluation
    changes = []
    if evaluation.batch_size > 1:
        changes.append(f"evaluation.batch_size below {evaluation.batch_size}")
    if evaluation.precision == "fp32" and not on_host:
        changes.append("evaluation.precision=bf16")
    if evaluation.compile is not False:
        changes.append("evaluation.compile=false")
    if on_host and config.data.workers:
        changes.append(f"data.workers below {config.data.workers}")
    return _one_of(changes) or "use a machine with more memory, or --device cpu"


def _one_of(changes: list[str]) -> str:
    """Settings in words; empty where there are none."""
    if not changes:
        return ""
    *others, last = changes
    return f"use --set with {', '.join(others)} or {last}" if others else f"use --set with {last}"


def keep_freed_memory() -> None:
    """Keep the memory that a training step on a CPU frees for the next step.

    glibc returns it to the kernel, which gives it back page by page, zeroed: a tenth of a step of `synthetic_tiny`.
    The process never needs more than at its peak. Nothing happens where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD):
        libc.mallopt(option, value)
