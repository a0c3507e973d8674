"""Two GPUs: NCCL joins the gradients, gloo what the hosts tell each other; the weights stay the same in both."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.parity.golden import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def test_two_processes_train_the_same_weights(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "tests.gpu.two_processes", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"] and first["loss"] != second["loss"]
    assert [first[name] for name in ("largest", "any", "ranks")] == [11, [True, False], [0, 1]]
    assert [second[name] for name in ("largest", "any", "ranks")] == [11, [True, False], [0, 1]]
