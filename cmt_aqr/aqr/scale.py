"""The strength of the bias: one number for the whole model, learnt inside a range or fixed."""

import torch
from torch import Tensor, nn


class _ClampInwards(torch.autograd.Function):
    """Clamp whose gradient is held back only where a step along it would lead (further) out of the range."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # Descent moves x against its gradient.
        leads_out = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return grad.masked_fill(leads_out, 0), None, None


def clamp_inwards(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to [low, high], with a gradient that can bring it back.

    The plain clamp has gradient 0 outside: a parameter that an optimizer's momentum once carried over a border would
    stay there for ever. Here, at a border and beyond, the gradient passes where a descent step along it leads inwards,
    and is 0 where it leads outwards. Inside the range it is the identity's.
    """
    return _ClampInwards.apply(x, low, high)


class Scale(nn.Module):
    """The factor between weights and bias.

    Args:
        value: at the start.
        is_learned: True: a parameter, ``value``; False: a constant, which is not part of the state.
        limits: lowest and highest value in the forward pass.

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
        """The scale (1,), inside its limits."""
        return clamp_inwards(self.value, *self.limits)
