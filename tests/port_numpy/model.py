"""What a bundle tells a port: weights, settings and tensors; and the layers that everything else is made of."""

import json
from pathlib import Path

import numpy as np
from numpy import ndarray
from safetensors.numpy import load_file

DECODER_EPS = 1e-5
INVERSE_SIGMOID_EPS = 1e-5


class Model:
    """Weights and settings of a bundle, and one mistake that the port is to make.

    Attributes:
        constants: sizes and settings, as in the manifest.
        aqr: its configuration; None without AQR.
        dtype: float64 or float32, of everything that is computed.
        mistake: one of MISTAKES in test_port.py, or empty.
    """

    def __init__(self, folder: Path, dtype: str, mistake: str = "") -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        self.constants = manifest["constants"]
        self.aqr = manifest["config"]["model"]["aqr"]
        self.dtype = np.dtype(dtype)
        self.mistake = mistake
        self._weights = load_file(folder / "weights.safetensors")
        self._inputs = load_file(folder / "inputs.safetensors")
        self._stages = load_file(folder / f"{dtype}.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._stages

    def weight(self, name: str) -> ndarray:
        """A parameter in the dtype of the computation."""
        return self._weights[name].astype(self.dtype)

    def has_weight(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return name in self._weights

    def given(self, name: str) -> ndarray:
        """A tensor of the stages that the port does not compute, or an input."""
        return self._inputs[name] if name.startswith("inputs/") else self._stages[name]

    def grids(self) -> list[dict]:
        """Token grids in order, each with the index of its first token."""
        grids, start = [], 0
        for grid in self.constants["grids"]:
            grids.append({**grid, "start": start})
            start += grid["views"] * grid["rows"] * grid["cols"]
        return grids

    def linear(self, name: str, x: ndarray) -> ndarray:
        """x @ weight.T + bias."""
        return x @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")

    def mlp(self, name: str, x: ndarray) -> ndarray:
        """Two linear layers with a ReLU between them."""
        return self.linear(f"{name}.2", np.maximum(self.linear(f"{name}.0", x), 0))

    def norm(self, name: str, x: ndarray) -> ndarray:
        """Layer norm of the decoder and of the weight generator."""
        eps = 1e-6 if self.mistake == "layer norm eps" else DECODER_EPS
        return normalise(x, eps) * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")

    def project(self, name: str, part: int, x: ndarray) -> ndarray:
        """Query (0), key (1) or value (2) of an attention: (B, N, C) -> (B, M, N, D)."""
        weight = np.split(self.weight(f"{name}.in_proj_weight"), 3)[part]
        bias = np.split(self.weight(f"{name}.in_proj_bias"), 3)[part]
        y = x @ weight.T + bias
        heads = self.constants["num_heads"]
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def merge(self, name: str, heads: ndarray) -> ndarray:
        """Heads (B, M, N, D) side by side and through the output projection: (B, N, C)."""
        merged = heads.transpose(0, 2, 1, 3)
        return self.linear(f"{name}.out_proj", merged.reshape(*merged.shape[:2], -1))

    def to_metres(self, unit: ndarray) -> ndarray:
        """Unit coordinates (..., 3) -> metres."""
        low, high = self.range_in(unit.dtype)
        return unit * (high - low) + low

    def to_unit(self, metres: ndarray) -> ndarray:
        """Metres (..., 3) -> unit coordinates."""
        low, high = self.range_in(metres.dtype)
        return (metres - low) / (high - low)

    def range_in(self, dtype: np.dtype) -> tuple[ndarray, ndarray]:
        """Lowest and highest x, y, z."""
        low, high = np.split(np.array(self.constants["point_range"], dtype), 2)
        return low, high


def normalise(x: ndarray, eps: float) -> ndarray:
    """(x - mean) / sqrt(var + eps) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def sigmoid(x: ndarray) -> ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def inverse_sigmoid(x: ndarray) -> ndarray:
    """ln(x / (1 - x)), both clamped."""
    x = np.clip(x, 0, 1)
    return np.log(np.maximum(x, INVERSE_SIGMOID_EPS) / np.maximum(1 - x, INVERSE_SIGMOID_EPS))


def softmax(scores: ndarray) -> tuple[ndarray, ndarray]:
    """Shares over the last axis, and the natural logarithm of the sum of exp."""
    largest = scores.max(-1, keepdims=True)
    powers = np.exp(scores - largest)
    total = powers.sum(-1, keepdims=True)
    return powers / total, (largest + np.log(total))[..., 0]
