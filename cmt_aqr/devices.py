"""The device that a command runs on, and copies between it and the host that do not wait for it."""

import torch
from torch import Tensor

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


class HostCopy:
    """Tensors on their way to the host: what is launched after this runs while they travel.

    Args:
        tensors: on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]  # page-locked
        self._event = None
        if tensors[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The copies, once the GPU has reached this point; later launched work is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a copy to a GPU from memory that is not page-locked would wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
