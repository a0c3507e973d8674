"""Seeds: the randomness of a step depends on (seed, step, process) alone, so that a resumed run repeats itself."""

import os

import numpy as np
import torch
from torch import Tensor


def seed_process(seed: int, *, deterministic: bool) -> None:
    """Seed weight initialisation, the same in every process; optionally require deterministic algorithms.

    Args:
        seed: of the run.
        deterministic: repeat a run bit for bit on the same hardware; slower. Operations without a deterministic
            version warn.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int, rank: int) -> np.random.Generator:
    """Seed torch (dropout) for one step of one process.

    Returns:
        A generator for the draws that all processes must share in this step, such as GridMask's.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, 1)).generate_state(1)[0]))
    return np.random.default_rng((seed, step))


def denoising_noise(seed: int, step: int, positions: range, num_dn: int) -> Tensor:
    """Noise of the denoising queries of one step, drawn frame by frame.

    Args:
        positions: of this process's frames in the global batch; the noise of a frame is then the same however many
            processes share the batch.
        num_dn: rows a frame.

    Returns:
        (B, num_dn, 3) float32, uniform in [0, 1), on the CPU.
    """
    rows = [np.random.default_rng((seed, step, 2, at)).random((num_dn, 3), dtype=np.float32) for at in positions]
    return torch.from_numpy(np.stack(rows))
