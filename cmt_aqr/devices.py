"""The device that a command runs on."""

import torch

from cmt_aqr.config import ConfigError


def choose_device(name: str | None) -> torch.device:
    """The device of ``--device``; None: cuda where there is a GPU, else cpu.

    Raises:
        ConfigError: cuda without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(["--device cuda: this PyTorch sees no CUDA GPU; use --device cpu"])
    return torch.device(name or ("cuda" if has_gpu else "cpu"))
