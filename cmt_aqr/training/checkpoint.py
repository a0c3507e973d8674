"""Checkpoints: written atomically, read without running code from the file."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmt_aqr.errors import UserError
from cmt_aqr.files import atomic_path

FORMAT = "cmt_aqr checkpoint 1"


class CheckpointError(UserError):
    """A file that cannot be loaded, or that belongs to another model."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that the file under ``path`` is at all times either the old one or the whole new one.

    Args:
        path: the final name.
        state: tensors, numbers, text, lists and dictionaries only.

    Raises:
        CheckpointError: the disk is full or cannot be written; the previous file is untouched.
    """
    path = Path(path)
    try:
        with atomic_path(path) as partial, open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise CheckpointError(f"{path}: could not be saved: {error}{kept}") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, needs code to be run, or comes from another program.
    """
    state = _read(Path(path))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (format {state.get('format')!r}, expected {FORMAT!r}); "
            "official weights go through python -m cmt_aqr.tools.import_checkpoint"
        )
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a checkpoint of this project, a safetensors file, or a plain state dict (.pth).

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged safetensors file: {error}") from None
    state = _read(path)
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no named tensors")
    return state


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The configuration tree inside a checkpoint of this project; None for weights without one."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return None
    state = _read(path)
    return state.get("config") if state.get("format") == FORMAT else None


def load_into(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Strict loading with an error that a person can read.

    Raises:
        CheckpointError: names the first missing, unexpected and mis-shaped keys and counts the rest.
    """
    own = model.state_dict()
    problems = []
    for title, keys in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if keys:
            problems.append(f"{len(keys)} {title} ({_first(sorted(keys))})")
    shapes = [
        f"{key} {tuple(weights[key].shape)} against {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_first(shapes)})")
    if problems:
        raise CheckpointError(f"{source}: does not fit this model: {'; '.join(problems)}")
    model.load_state_dict(weights)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, KeyError or UnpicklingError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or needs code to be run to load it: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(state).__name__}")
    return state


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
