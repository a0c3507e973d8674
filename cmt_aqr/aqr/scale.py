"""The scale: the factor between weights and bias, one number for the whole model, learned inside limits or fixed."""

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """The factor between weights and bias.

    A learned scale is kept inside its limits by :meth:`clamp_`, called after every optimizer step, and not by its
    gradient: a gradient that is cut at a limit before processes average theirs would make the result depend on
    their number.

    Args:
        value: at the start.
        is_learned: True: a parameter, ``value``; False: a constant, which is not part of the state.
        limits: lowest and highest value.

    Raises:
        ValueError: limits that do not enclose the value.
    """

    def __init__(self, *, value: float, is_learned: bool, limits: tuple[float, float]) -> None:
        super().__init__()
        if not limits[0] <= value <= limits[1]:
            raise ValueError(f"a scale of {value:g} lies outside its limits {limits[0]:g} to {limits[1]:g}")
        self.limits = limits
        # One element, not 0 dimensions, as in the checkpoints.
        start = torch.tensor([float(value)])
        if is_learned:
            self.value = nn.Parameter(start)
        else:
            self.register_buffer("value", start, persistent=False)

    def forward(self) -> Tensor:
        """The scale (1,), inside its limits.

        Inside and exactly at a limit the gradient is that of the identity. A parameter beyond a limit, which only a
        checkpoint can bring, acts as the limit without a gradient until the first :meth:`clamp_`.
        """
        low, high = self.limits
        # Written out: at a limit, torch.clamp passes the gradient or not depending on the version of torch.
        value = torch.where(self.value < low, low, self.value)
        return torch.where(value > high, high, value)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Move the parameter to the nearest value inside the limits."""
        self.value.clamp_(*self.limits)
