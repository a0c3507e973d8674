"""Memory that runs out is one sentence with the keys that help, in the words of the machine it ran out on."""

import platform
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from cmt_aqr.config import load_config
from cmt_aqr.memory import (
    OutOfMemory,
    evaluation_advice,
    explain_out_of_memory,
    keep_freed_memory,
    training_advice,
)
from cmt_aqr.training.run_folder import LATEST
from tests.parity.golden import REPOSITORY

# As PyTorch 2.14 writes it on a GPU.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.05 GiB is "
    "free. Process 7 has 78.05 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 "
    "GiB is reserved by PyTorch but unallocated."
)

DECODER = ("model.activation_checkpointing=true",)


def sentence(act, advice=lambda on_host: f"on_host={on_host}") -> str:
    with pytest.raises(OutOfMemory) as error, explain_out_of_memory(advice):
        act()
    return str(error.value)


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda: fail(torch.OutOfMemoryError(CUDA)),
            "the GPU is out of memory (2.25 GiB more were asked for, it has 79.11 GiB); on_host=False",
        ),
        (
            lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            "the GPU is out of memory; on_host=False",
        ),
        (
            lambda: torch.empty(10**15),
            "the host is out of memory (4000000000000000 bytes more were asked for); on_host=True",
        ),
        (lambda: np.empty(10**16), "the host is out of memory; on_host=True"),
    ],
    ids=["gpu", "cublas", "torch on the CPU", "numpy"],
)
def test_an_allocation_that_fails_is_a_sentence(act, text):
    assert sentence(act) == text


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explain_out_of_memory(lambda on_host: ""):
        torch.ones(2, 3) @ torch.ones(2, 3)


def advice(name, *changes, world_size=1, work_dir, on_host=False):
    return training_advice(load_config(name, changes), world_size, work_dir, on_host)


def test_the_training_is_told_three_keys_and_how_to_resume(tmp_path):
    (tmp_path / LATEST).touch()
    assert advice("cmt_r50_800x320", "training.batch_size=16", world_size=2, work_dir=tmp_path) == (
        "use --set with training.accumulation=2 (the same step in smaller parts), model.activation_checkpointing=true "
        f"or training.batch_size below 16 (in a new run); resume with --resume --work-dir {tmp_path}"
    )


def test_no_key_is_named_that_cannot_help(tmp_path):
    passes = ("training.batch_size=6", "training.accumulation=2")
    options = (*passes, *DECODER, "model.camera.activation_checkpointing=false")
    text = advice("cmt_r50_800x320", *options, work_dir=tmp_path)
    assert text == (
        "use --set with training.accumulation=3 (the same step in smaller parts), "
        "model.camera.activation_checkpointing=true or training.batch_size below 6 (in a new run); "
        "nothing was saved yet, start again with the same command"
    )
    options = ("training.batch_size=2", *DECODER, "model.camera.activation_checkpointing=true")
    assert advice("cmt_r50_800x320", *options, world_size=2, work_dir=tmp_path).startswith("use a smaller model; ")


def test_the_hosts_memory_is_the_workers_too(tmp_path):
    text = advice("cmt_r50_800x320", "data.workers=8", work_dir=tmp_path, on_host=True)
    assert " or data.workers below 8; " in text
    assert "data.workers" not in advice("cmt_r50_800x320", "data.workers=8", work_dir=tmp_path)


def test_an_evaluation_is_told_its_own_keys():
    config = load_config("synthetic_tiny")
    assert sentence(lambda: fail(torch.OutOfMemoryError(CUDA)), partial(evaluation_advice, config)).endswith(
        "; use --set with evaluation.batch_size below 4 or evaluation.precision=bf16"
    )


PAGE_FAULTS = """
import resource, torch
from cmt_aqr.memory import keep_freed_memory
{call}
def step():
    kept = [torch.ones(5_000_000) for _ in range(10)]
    kept.append(torch.ones(1000))
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns memory that is freed")
def test_memory_that_is_freed_is_there_for_the_next_step():
    """200 MB of activations in pieces of 20 MB, the same again in the next step: 48 828 pages of 4 KiB.

    Now and then a piece of one process lies where glibc treats it the other way (4 882 pages), hence two processes.
    """
    faults = {}
    for call in ("", "keep_freed_memory()"):
        command = [sys.executable, "-c", PAGE_FAULTS.format(call=call)]
        runs = [subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True) for _ in range(2)]
        faults[call] = [int(done.stdout) for done in runs]
    assert max(faults[""]) > 1000 and min(faults["keep_freed_memory()"]) < 100, faults


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("cmt_aqr.memory.ctypes", None)
    keep_freed_memory()
