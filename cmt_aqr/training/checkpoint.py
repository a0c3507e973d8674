"""Checkpoints: written atomically with a checksum, read without running code from the file."""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmt_aqr.config import current_names
from cmt_aqr.errors import describe_os_error
from cmt_aqr.files import atomic_path
from cmt_aqr.training.checkpoint_checks import (
    CheckpointError,
    check_config,
    check_dtype,
    check_finite,
    check_named_tensors,
    check_step,
    describe_non_finite,
    find_non_finite,
    printable,
    show,
)
from cmt_aqr.training.checksum import ChecksumWriter, check_records, check_safetensors, has_checksum

FORMAT = "cmt_aqr checkpoint 2"
# Before version 2 there was no checksum.
FORMAT_WITHOUT_CHECKSUM = "cmt_aqr checkpoint 1"
ZIP_START = b"PK\x03\x04"


def save_checkpoint(path: str | Path, state: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write a checkpoint so that the file under ``path`` is at all times either the old one or the whole new one.

    Args:
        path: the final name.
        state: tensors, numbers, text, lists and dictionaries only.
        previous: the file that errors call the previous checkpoint where it exists; ``path`` by default.

    Raises:
        CheckpointError: a tensor is not finite, the disk is full or cannot be written; the previous file is untouched.
    """
    path = Path(path)
    untouched = "; the previous checkpoint is untouched" if (previous or path).exists() else ""
    names, count = find_non_finite(state)
    if names:
        raise CheckpointError(f"{path}: not saved: {describe_non_finite(names, count)}{untouched}")
    try:
        with atomic_path(path) as partial, open(partial, "wb") as file:
            writer = ChecksumWriter(file)
            try:
                torch.save({"format": FORMAT, **state}, writer)
            except RuntimeError as error:
                raise (writer.error or error) from None  # torch reports a full disk as an error of its own
            writer.finish()
    except OSError as error:
        reason = describe_os_error(OSError(error.errno, error.strerror))
        raise CheckpointError(f"{path}: could not be saved: {reason}{untouched}") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU.

    Returns:
        ``config`` and ``model``; a run's also holds ``step``, ``optimizer``, ``scaler`` and, where it keeps one, the
        running average ``ema``, which ``run_folder.restore`` checks against those that they are for.

    Raises:
        CheckpointError: the file is missing, damaged, needs code to be run, or comes from another program.
    """
    state = _read(Path(path))
    _check_content(state, path)
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a checkpoint of this project, a safetensors file, or a plain state dict (.pth).

    Of a run that keeps a running average of its weights, the average.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    return load_weights_and_config(path)[0]


def load_weights_and_config(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """As :func:`load_weights`, with the configuration tree of a checkpoint of this project, None for other files."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    state = _read(path)
    if "format" in state:
        _check_content(state, path)
        return state.get("ema", state["model"]), state["config"]
    key = next((key for key in ("model", "state_dict") if isinstance(state.get(key), dict)), None)
    weights = state if key is None else state[key]
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: holds no named tensors")
    check_named_tensors(weights, f"{path}: {key or 'state dict'}")
    return weights, None


def load_into(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Strict loading with a readable error.

    Raises:
        CheckpointError: names the first missing, unexpected and mis-shaped keys and counts the rest, a tensor of
            another type, or the first that is not finite.
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
    for key, tensor in weights.items():
        check_dtype(tensor, own[key], f"{source}: {key}")
    check_finite(weights, str(source))
    model.load_state_dict(weights)


def _check_content(state: dict[str, Any], path: str | Path) -> None:
    """Check what can be checked without a model; keys of the configuration get their current names."""
    if state.get("format") not in (FORMAT, FORMAT_WITHOUT_CHECKSUM):
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (format: {show(state.get('format'))}, expected {FORMAT!r}); "
            "official weights go through python -m cmt_aqr.tools.import_checkpoint"
        )
    check_config(state.get("config"), str(path))
    state["config"] = current_names(state["config"])
    check_named_tensors(state.get("model"), f"{path}: model")
    if "ema" in state:
        check_named_tensors(state["ema"], f"{path}: ema")
    if "step" in state:
        check_step(state["step"], str(path))


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, after the file has been checked for damage."""
    try:
        with open(path, "rb") as file:
            is_zip, is_protected = _check_file(file, path)
            file.seek(0)
            state = _unpickle(file, path, is_zip=is_zip)
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {show(state)}")
    own_format = state.get("format")
    if own_format == FORMAT and not is_protected:
        raise CheckpointError(f"{path}: damaged: the checksum at its end is missing")
    if own_format == FORMAT_WITHOUT_CHECKSUM and os.environ.get("RANK", "0") == "0":
        print(f"note: {path} is of an older version, without a checksum of the whole file", file=sys.stderr, flush=True)
    return state


def _check_file(file: BinaryIO, path: Path) -> tuple[bool, bool]:
    """Compare the checksum, or the CRCs where there is none; returns whether it is a zip file and has a checksum."""
    start = file.read(4)
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    try:
        if has_checksum(file):
            return True, True
        if start == ZIP_START:
            check_records(file)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return start == ZIP_START, False


def _unpickle(file: BinaryIO, path: Path, *, is_zip: bool) -> Any:
    """torch.load with one sentence instead of its advice to allow code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, KeyError, UnpicklingError ...
        if refused := re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error)):
            raise CheckpointError(
                f"{path}: refused, it needs code to be run: it holds an object of {refused[1] or refused[2]}; keep "
                "tensors, numbers and text only, as in torch.save(model.state_dict(), ...)"
            ) from None
        if is_zip:
            raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote") from None
        file.seek(0)
        raise CheckpointError(
            f"{path}: neither a checkpoint nor weights: expected a file of torch.save, or of safetensors with the "
            f"ending .safetensors; it starts with {ascii(file.read(8))[1:]}"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            check_safetensors(file)
        weights = load_file(path)
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from None
    except (SafetensorError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {_first_line(error)}") from None
    check_named_tensors(weights, str(path))
    return weights


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(map(printable, items[:count])) + (", ..." if len(items) > count else "")
