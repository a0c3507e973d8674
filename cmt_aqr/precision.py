"""Precision: what a configuration may ask for, and the float32 of stages that are never rounded.

Autocast reaches the branches, the AQR weight generator and the decoder. Positions, reference points, windows, heads and
losses switch it off inside and convert what they are given with :func:`at_least_float32`.
"""

import torch
from torch import Tensor

# Values of `training.precision` and `evaluation.precision`.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 -> float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
