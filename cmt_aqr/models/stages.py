"""What the image backbones share: stages whose maps are returned, and blocks that are recomputed."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def check_out_stages(out_stages: Sequence[int], stages: Sequence[int]) -> None:
    """Raise ValueError unless the stages whose maps are returned are some of ``stages``, ascending."""
    if not out_stages or not set(out_stages) <= set(stages) or list(out_stages) != sorted(set(out_stages)):
        raise ValueError(f"out_stages is {tuple(out_stages)}; expected ascending stages out of {tuple(stages)}")


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *, use_checkpoint: bool) -> Tensor:
    """One block after the other.

    Args:
        use_checkpoint: recompute each block in the backward pass instead of keeping its activations. A batch norm in
            training mode then updates its running statistics twice per step.
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if use_checkpoint and torch.is_grad_enabled() else block(x)
    return x
