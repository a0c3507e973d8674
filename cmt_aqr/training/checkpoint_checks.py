"""What a checkpoint must look like inside: every deviation is one sentence with the file, the key and both values."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cmt_aqr.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# State of AdamW for one parameter: the number of updates and two tensors of the parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq")
# No run is longer: a larger step is damage.
MAX_STEP = 10**12
# A configuration has a few hundred values in four levels; one that refers to itself would never end.
MAX_CONFIG_VALUES = 10_000
MAX_CONFIG_DEPTH = 20


class CheckpointError(UserError):
    """A file that cannot be loaded or saved, or that belongs to another model."""


def check_named_tensors(value: Any, source: str) -> None:
    """Refuse what is not a dictionary of text -> dense real tensors.

    Args:
        source: the file and the key, such as ``latest.pt: model``.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected named tensors, got {show(value)}")
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{source}: expected text as names of tensors, got the key {show(name)}")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source}.{printable(name)}: expected a tensor, got {show(tensor)}")
        check_dense(tensor, f"{source}.{printable(name)}")


def check_dense(tensor: Tensor, source: str) -> None:
    """Refuse sparse, nested, quantized, complex and meta tensors."""
    kind = None
    if tensor.is_meta:
        kind = "meta tensor, which has no values"
    elif tensor.layout != torch.strided or tensor.is_nested:
        kind = f"{str(tensor.layout).removeprefix('torch.')} tensor"
    elif tensor.is_quantized or tensor.is_complex():
        kind = f"{name_of(tensor.dtype)} tensor"
    if kind is not None:
        raise CheckpointError(f"{source}: expected a dense tensor of real numbers, got a {kind}")


def check_dtype(tensor: Tensor, own: Tensor, source: str) -> None:
    """Refuse integers for weights and floating point for counters; floating point of another width is converted."""
    if own.is_floating_point():
        fits, expected = tensor.dtype in FLOATS, "floating point"
    else:
        fits, expected = tensor.dtype == own.dtype, name_of(own.dtype)
    if not fits:
        raise CheckpointError(f"{source}: expected {expected}, got {name_of(tensor.dtype)}")


def check_finite(state: Mapping[str, Any], source: str) -> None:
    """Refuse tensors with NaN or infinity, at any depth; ``source`` is the file."""
    names, count = find_non_finite(state)
    if names:
        raise CheckpointError(f"{source}: {describe_non_finite(names, count)}")


def find_non_finite(state: Mapping[str, Any]) -> tuple[list[str], int]:
    """Names of the tensors that hold NaN or infinity, and the number of all; waits once for each device."""
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    count = 0
    for name, tensor in tensors_of(state):
        count += 1
        if tensor.is_floating_point():
            flags.setdefault(tensor.device, []).append((name, torch.isfinite(tensor).all()))
    found = []
    for pairs in flags.values():
        is_finite = torch.stack([flag for _, flag in pairs]).tolist()
        found += [name for (name, _), finite in zip(pairs, is_finite, strict=True) if not finite]
    return found, count


def describe_non_finite(names: list[str], count: int) -> str:
    """A clause for an error."""
    return f"{len(names)} of {count} tensors hold values that are not finite, the first is {names[0]}"


def tensors_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Dotted names and tensors of nested dictionaries and lists."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from tensors_of(value, f"{prefix}.{key}" if prefix else str(key))


def check_config(config: Any, source: str) -> None:
    """Refuse a configuration that is not a tree of text keys and plain values with a block ``model``."""
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: config: expected a block of keys, got {show(config)}")
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{source}: config.model: expected a block of keys, got {show(config.get('model'))}")
    pending = [("config", config, 1)]
    count = 0
    while pending:
        key, value, depth = pending.pop()
        count += 1
        if count > MAX_CONFIG_VALUES or depth > MAX_CONFIG_DEPTH:
            raise CheckpointError(
                f"{source}: config: expected at most {MAX_CONFIG_VALUES} values in {MAX_CONFIG_DEPTH} levels, got more"
            )
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise CheckpointError(f"{source}: {key}: expected text as keys, got {show(name)}")
            pending += [(f"{key}.{printable(name)}", item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{key}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        elif not (value is None or isinstance(value, str | float) or _is_small_int(value)):
            raise CheckpointError(f"{source}: {key}: expected text, a number, true, false or null, got {show(value)}")


def check_step(step: Any, source: str, total_steps: int = MAX_STEP) -> None:
    """Refuse what is not a whole number from 0 to ``total_steps``."""
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= total_steps:
        raise CheckpointError(f"{source}: step: expected a whole number from 0 to {total_steps}, got {show(step)}")


def check_optimizer(state: Any, optimizer: torch.optim.Optimizer, step: int, source: str) -> None:
    """Refuse a state of another optimizer or model, and one that would make the next step NaN.

    Args:
        state: what ``optimizer.state_dict()`` gave when the checkpoint was written.
        step: finished steps; after the first one there must be a state.
    """
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise CheckpointError(f"{source}: optimizer: expected the state of an optimizer, got {show(state)}")
    own = [len(group["params"]) for group in optimizer.param_groups]
    found = _group_sizes(state.get("param_groups"))
    if found != own:
        shown = found if found and len(found) <= len(own) + 2 else show(state.get("param_groups"))
        raise CheckpointError(f"{source}: optimizer.param_groups: expected groups of {own} parameters, got {shown}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = state["state"]
    if step > 0 and not entries:
        raise CheckpointError(f"{source}: optimizer.state: expected one entry for each parameter, got none")
    for index, entry in entries.items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise CheckpointError(
                f"{source}: optimizer.state: expected keys from 0 to {len(parameters) - 1}, got {show(index)}"
            )
        _check_moments(entry, parameters[index], f"{source}: optimizer.state[{index}]")
    check_finite({"optimizer": {"state": entries}}, source)


def _group_sizes(groups: Any) -> list[int] | None:
    """Numbers of parameters of the groups, None where they are not numbered one after the other from 0."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    params = [group.get("params") for group in groups]
    if not all(isinstance(numbers, list) for numbers in params):
        return None
    flat = [number for numbers in params for number in numbers]
    if not all(isinstance(number, int) for number in flat) or flat != list(range(len(flat))):
        return None
    return [len(numbers) for numbers in params]


def _check_moments(entry: Any, parameter: Tensor, source: str) -> None:
    """One parameter's state of AdamW."""
    keys = ("step", *MOMENTS)
    if not isinstance(entry, dict) or set(entry) != set(keys):
        got = ", ".join(map(str, entry)) if isinstance(entry, dict) else show(entry)
        raise CheckpointError(f"{source}: expected {', '.join(keys)}, got {got or 'nothing'}")
    for key in keys:
        tensor, where = entry[key], f"{source}.{key}"
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: expected a tensor, got {show(tensor)}")
        check_dense(tensor, where)
        check_dtype(tensor, parameter, where)
        shape = parameter.shape if key in MOMENTS else torch.Size()
        if tensor.shape != shape:
            raise CheckpointError(f"{where}: expected the shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for key in ("step", "exp_avg_sq"):
        if (lowest := entry[key].min().item() if entry[key].numel() else 0) < 0:
            raise CheckpointError(f"{source}.{key}: expected values of at least 0, got {lowest:.4g}")


def check_scaler(state: Any, scaler: torch.amp.GradScaler, source: str) -> None:
    """Refuse a state of another loss scaler: other keys, or numbers out of range."""
    own = scaler.state_dict()
    if not isinstance(state, dict) or set(state) != set(own):
        raise CheckpointError(f"{source}: scaler: expected the keys {sorted(own)}, got {show(state)}")
    for key, value in state.items():
        kind = int if isinstance(own[key], int) else float
        lowest, highest = (0, 2**62) if kind is int else (1e-30, 1e30)
        if type(value) is not kind or not lowest <= value <= highest:
            raise CheckpointError(
                f"{source}: scaler.{key}: expected a number ({kind.__name__}) from {lowest} to {highest}, "
                f"got {show(value)}"
            )


def printable(name: str) -> str:
    """A key of a file as part of a sentence."""
    return name if len(name) <= 120 and name.isprintable() else ascii(name[:100]) + "..."


def _is_small_int(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() <= 64


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def show(value: Any) -> str:
    """A short description of any object, on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a {name_of(value.dtype)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)} items"
    if isinstance(value, int) and not _is_small_int(value):
        return f"a whole number of {value.bit_length()} bits"
    text = ascii(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
