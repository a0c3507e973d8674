"""AdamW with factors by parameter-name prefix, schedules, freezing, the running average of the weights."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmt_aqr.config import TrainingConfig
from cmt_aqr.yaml_reader import show_value, suggest

# PyTorch's own default for AdamW; the original sets neither.
BETA1, BETA2 = 0.9, 0.999


def longest_prefix(name: str, factors: Mapping[str, float], otherwise: float = 1.0) -> float:
    """The factor of the most specific prefix of ``name``; ``otherwise`` when none fits."""
    fitting = [prefix for prefix in factors if name.startswith(prefix)]
    return factors[max(fitting, key=len)] if fitting else otherwise


def prefix_problems(model: nn.Module, training: TrainingConfig) -> list[str]:
    """What is wrong with the name prefixes of a configuration: a typing error would silently train the wrong thing.

    Args:
        model: the detector; its weights may be on the meta device.
        training: ``lr_mult``, ``decay_mult`` and ``freeze`` name parameters, ``norm_eval`` modules with batch norm.

    Returns:
        One sentence for each prefix that fits nothing, with its configuration key.
    """
    parameters = [name for name, _ in model.named_parameters()]
    norms = [name for name, module in model.named_modules() if _is_batch_norm(module)]
    found = []
    for key, names, what in (
        ("lr_mult", parameters, "parameter name"),
        ("decay_mult", parameters, "parameter name"),
        ("freeze", parameters, "parameter name"),
        ("norm_eval", norms, "batch norm's name"),
    ):
        for prefix in getattr(training, key):
            if not any(name.startswith(prefix) for name in names):
                first = ", ".join(sorted({name.split(".")[0] for name in names})) or "nothing, there is none"
                found.append(
                    f"training.{key}: no {what} begins with {show_value(prefix)}; they begin with {first}"
                    f"{_similar_prefix(prefix, names)}"
                )
    if parameters and all(name.startswith(tuple(training.freeze)) for name in parameters):
        found.append("training.freeze: every parameter is frozen, nothing is left to train")
    return found


def _similar_prefix(prefix: str, names: Sequence[str]) -> str:
    """The dotted beginning of a name that a wrong prefix was probably meant for; one that ends like it comes first."""
    parts = [name.split(".") for name in names]
    options = sorted({".".join(part[: i + 1]) for part in parts for i in range(len(part))}, key=lambda o: (len(o), o))
    same_end = [option for option in options if option.endswith(f".{prefix}")]
    return f"; did you mean {same_end[0]!r}?" if same_end else suggest(prefix, options)


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Stop the gradient of every parameter whose name begins with one of the prefixes."""
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(prefixes)):
            parameter.requires_grad_(False)


def set_training_mode(model: nn.Module, eval_prefixes: Sequence[str]) -> None:
    """``model.train()``, except that modules under these prefixes stay in eval mode (batch-norm keeps its statistics).

    Args:
        model: the detector, not its DistributedDataParallel wrapper.
        eval_prefixes: module-name prefixes; an empty text means the whole model's batch-norm.
    """
    model.train()
    for name, module in model.named_modules():
        if _is_batch_norm(module) and eval_prefixes and name.startswith(tuple(eval_prefixes)):
            module.eval()


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    lr_mult: Mapping[str, float],
    decay_mult: Mapping[str, float],
) -> torch.optim.AdamW:
    """AdamW with one group for each pair of factors.

    Args:
        model: its parameters that need a gradient are optimised.
        lr, weight_decay: base values; a group's own are these times its factors. ``lr_scale`` in each group keeps the
            factor, for :func:`set_schedule`.

    Raises:
        ValueError: nothing is left to train.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors = longest_prefix(name, lr_mult), longest_prefix(name, decay_mult)
            groups.setdefault(factors, []).append(parameter)
    if not groups:
        raise ValueError("every parameter is frozen, nothing is left to train")
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay * decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=lr,
        betas=(BETA1, BETA2),
        fused=True,
    )


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_norm: Tensor) -> None:
    """An optimizer step that leaves weights and state as they are where the gradient is not finite.

    The device decides, the host does not wait for it: ``found_inf`` is how the gradient scaler tells a fused optimizer,
    here also without a scaler.

    Args:
        optimizer: of :func:`make_optimizer`; its gradients are unscaled.
        scaler: of fp16, otherwise not enabled.
        grad_norm: of all gradients, 0-dim.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        return
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    optimizer.step()
    del optimizer.found_inf


def cyclic(step: int, total_steps: int, *, pct_start: float, top: float, end: float) -> float:
    """Factor of the one-cycle schedule: cosine from 1 to ``top``, then cosine from ``top`` to ``end``.

    Args:
        step: in [0, total_steps).
        pct_start: part of the steps that goes to the top.

    *Source*: mmcv's cyclic hooks with one cycle, as the original's configs use them for rate and momentum.
    """
    up_steps = max(1, int(pct_start * total_steps))
    if step < up_steps:
        start, stop, progress = 1.0, top, step / up_steps
    else:
        start, stop, progress = top, end, (step - up_steps) / max(1, total_steps - up_steps)
    return stop + 0.5 * (start - stop) * (1 + math.cos(math.pi * progress))


def one_cycle(step: int, total_steps: int, *, pct_start: float, top: float, end: float) -> float:
    """Factor of a one-cycle schedule that reaches ``end`` in the last step; arguments as those of :func:`cyclic`.

    *Source*: ``torch.optim.lr_scheduler.OneCycleLR`` with two phases.
    """
    turn = pct_start * total_steps - 1
    if turn > 0 and step <= turn:
        start, stop, progress = 1.0, top, step / turn
    else:
        start, stop, progress = top, end, (step - turn) / (total_steps - 1 - turn)
    return stop + 0.5 * (start - stop) * (1 + math.cos(math.pi * progress))


def warmup_cosine(step: int, total_steps: int, *, pct_start: float, top: float, end: float) -> float:
    """Factor that climbs in a line from 1 to ``top``, then falls as a cosine to ``end``; see :func:`cyclic`.

    *Source*: ``LinearLR`` and ``CosineAnnealingLR`` of ``torch.optim.lr_scheduler``, one after the other.
    """
    up_steps = int(pct_start * total_steps)
    if step < up_steps:
        return 1.0 + (top - 1.0) * step / up_steps
    return end + 0.5 * (top - end) * (1 + math.cos(math.pi * (step - up_steps) / (total_steps - up_steps)))


def rates(training: TrainingConfig, step: int, total_steps: int) -> tuple[float, float]:
    """Learning rate (before the groups' factors) and first beta of a step in [0, total_steps)."""
    lr = training.lr * (training.batch_size / training.lr_batch_size if training.lr_batch_size else 1.0)
    curve = {"cyclic": cyclic, "one_cycle": one_cycle, "cosine": warmup_cosine}[training.schedule]
    rate = curve(step, total_steps, pct_start=training.pct_start, top=training.lr_peak, end=training.lr_end)
    if training.schedule == "cosine":
        return lr * rate, BETA1
    momentum = curve(step, total_steps, pct_start=training.pct_start, top=training.min_momentum_ratio, end=1.0)
    return lr * rate, BETA1 * momentum


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model whose weights will follow it: decay * old + (1 - decay) * new; the first update copies.

    Buffers, such as the statistics of batch norm, are the model's own.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def set_schedule(optimizer: torch.optim.Optimizer, *, lr: float, momentum: float) -> None:
    """Write a learning rate (before the group's factor) and the first beta into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["betas"] = (momentum, group["betas"][1])
