"""Read named tensors from a folder that export wrote, a .safetensors file, or a .npz file of another program."""

import difflib
import json
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmt_aqr.errors import UserError, describe_os_error
from cmt_aqr.golden.catalogue import PRECISIONS

FORMAT = "cmt_aqr reference numerics 1"
MANIFEST = "manifest.json"
INPUTS, WEIGHTS = "inputs", "weights"


class BundleError(UserError):
    """A bundle or file cannot be compared; the message says which, and why."""


class Source:
    """Named tensors of one side of a comparison.

    Attributes:
        path: folder or file.
        manifest: of a bundle; empty for a file.
        precision: of its float tensors.
        names: of all tensors, in the order of the forward pass where a manifest tells it.
    """

    def __init__(self, path: Path, *, precision: str | None = None, transpose: Sequence[str] = ()) -> None:
        """Open the files and read the names; tensors are read when they are needed.

        Args:
            path: folder or file.
            precision: which of a bundle's files; None: the most exact one.
            transpose: NAME=AXES, such as ``lidar/bev_map=0,3,1,2``: the order in which the tensor's own axes give those
                of the bundle; NAME may hold ``*``.
        """
        self.path = path
        self.manifest = read_manifest(path) if path.is_dir() else {}
        self._files: dict[str, Any] = {}
        self._places: dict[str, tuple[str, str]] = {}
        if path.is_dir():
            self.precision = _choose_precision(path, self.manifest, precision)
            files = [(INPUTS, ""), (WEIGHTS, f"{WEIGHTS}/"), (self.precision, "")]
            for file, prefix in files:
                self._add(path / f"{file}.safetensors", prefix)
        else:
            self.precision = precision or "float32"
            self._add(path, "")
        order = {name: number for number, name in enumerate(self.manifest.get("tensors", {}))}
        self.names = sorted(self._places, key=lambda name: order.get(name, len(order)))
        self._axes = dict(parse_transpose(text) for text in transpose)
        self._check_transpose()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU, with its axes in the order of ``transpose``."""
        file, key = self._places[name]
        try:
            opened = self._files[file]
            tensor = opened.get_tensor(key) if file.endswith(".safetensors") else _from_numpy(opened[key])
        except (SafetensorError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise BundleError(f"{file}: {key} cannot be read: {_first_line(error)}") from None
        axes = next((axes for pattern, axes in self._axes.items() if fnmatchcase(name, pattern)), None)
        if axes is None:
            return tensor
        if sorted(axes) != list(range(tensor.ndim)):
            raise BundleError(
                f"--transpose {name}={','.join(map(str, axes))}: the shape in {self.path} is {tuple(tensor.shape)}; "
                f"name each axis, 0 to {tensor.ndim - 1}, once"
            )
        return tensor.permute(axes)

    def entry(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a tensor; empty where there is none."""
        return self.manifest.get("tensors", {}).get(name, {})

    def _add(self, path: Path, prefix: str) -> None:
        opened, names = open_file(path)
        self._files[str(path)] = opened
        self._places |= {prefix + name: (str(path), name) for name in names}

    def _check_transpose(self) -> None:
        for pattern in self._axes:
            if not any(fnmatchcase(name, pattern) for name in self.names):
                close = difflib.get_close_matches(pattern, self.names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise BundleError(f"--transpose {pattern}: {self.path} has no tensor of this name{hint}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises:
        BundleError: it is missing, damaged or of another program.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{describe_os_error(error)}; expected a folder that 'export' wrote, or a file") from None
    except ValueError as error:
        raise BundleError(f"{path}: damaged: {_first_line(error)}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path}: format is {found!r}, expected {FORMAT!r}; export the bundle again")
    return manifest


def parse_transpose(text: str) -> tuple[str, tuple[int, ...]]:
    """``NAME=0,3,1,2`` -> name, axes."""
    name, _, axes = text.rpartition("=")
    if not name or not all(axis.isdecimal() for axis in axes.split(",")):
        raise BundleError(f"--transpose {text}: expected NAME=AXES, such as lidar/bev_map=0,3,1,2")
    return name, tuple(map(int, axes.split(",")))


def open_file(path: Path) -> tuple[Any, list[str]]:
    """An opened file of tensors, and their names.

    Raises:
        BundleError: the file is missing, damaged, or of another type.
    """
    try:
        if path.suffix == ".safetensors":
            path.stat()  # the error of safe_open does not name the file
            opened = safe_open(path, framework="pt")
            return opened, list(opened.keys())
        if path.suffix == ".npz":
            opened = np.load(path, allow_pickle=False)
            return opened, list(opened.files)
    except OSError as error:
        raise BundleError(describe_os_error(error)) from None
    except (SafetensorError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: damaged: {_first_line(error)}") from None
    if not path.exists():
        raise BundleError(f"{path}: no such file or folder")
    raise BundleError(f"{path}: expected a folder that 'export' wrote, a .safetensors or a .npz file")


def _choose_precision(folder: Path, manifest: dict[str, Any], wanted: str | None) -> str:
    there = manifest["precisions"]
    if wanted is None:
        return next(precision for precision in PRECISIONS if precision in there)
    if wanted not in there:
        raise BundleError(f"{folder} holds {', '.join(there)}, not {wanted}; export it with --dtype {wanted}")
    return wanted


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"its type is {array.dtype}, expected numbers")
    wide = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name, array.dtype)
    return torch.from_numpy(np.array(array, dtype=wide))  # a copy: writable, and without negative strides


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
