"""Golden tensors of the original programs: where they lie, how they are read, how an error is measured."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.draws import Draw, restore

REPOSITORY = Path(__file__).resolve().parents[2]
# Parts of the golden files that come with the repository (tests/parity/make_small.py).
SMALL_FOLDER = Path(__file__).resolve().parent / "small"


def golden_dir() -> Path:
    """Folder of the golden files: `CMT_AQR_GOLDEN`, else `../shared/golden` beside the repository."""
    return Path(os.environ.get("CMT_AQR_GOLDEN") or REPOSITORY.parent / "shared" / "golden")


@dataclass(frozen=True)
class Measurement:
    """One comparison: golden file, what was compared, dtype of our numbers, relative error and its limit.

    `original` is the error of the original's own float32 run, where the file has it. An equality has limit 0.
    """

    golden: str
    stage: str
    dtype: torch.dtype
    error: float
    limit: float
    original: float | None = None


# Every comparison since the program started; tests/parity/report.py reads it.
MEASUREMENTS: list[Measurement] = []


class Golden:
    """One golden file, read lazily: `golden["out64/x"]` is a numpy array, `golden.tensor("in/x")` a torch tensor.

    Instead of arrays that were drawn a small file has the fields of a :class:`Draw` for each in `draws_json`, and the
    differences in the last bits of all of them, one after the other, in `draws_bits`.
    """

    def __init__(self, path: Path):
        self.name = path.stem
        self._arrays = np.load(path, allow_pickle=False)
        stored = self._arrays.files
        draws = json.loads(str(self._arrays["draws_json"])) if "draws_json" in stored else {}
        self._draws, start = {}, 0
        for name, fields in draws.items():
            draw = Draw.from_json(fields)
            self._draws[name] = draw, slice(start, start := start + draw.size)
        self._bits = self._arrays["draws_bits"] if draws else None
        self.names = (*(name for name in stored if not name.startswith("draws_")), *self._draws)
        self.meta = json.loads(str(self._arrays["meta_json"])) if "meta_json" in self.names else {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._draws:
            draw, bits = self._draws[name]
            return restore(draw, self._bits[bits])
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Array `name` as a torch tensor, converted to `dtype` where one is given."""
        tensor = torch.from_numpy(np.array(self[name]))
        return tensor if dtype is None else tensor.to(dtype)

    def state_dict(self, prefix: str = "sd/") -> dict[str, torch.Tensor]:
        """All arrays under `prefix`, with the prefix removed from their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)}

    def check(self, stage: str, actual, reference, limit: float) -> None:
        """Fail where the relative error exceeds `limit`; a `reference` given by its name is an array of the file."""
        actual, original = torch.as_tensor(actual), None
        if isinstance(reference, str):
            twin = reference.replace("out64/", "out32/")
            if twin != reference and twin in self:
                original = relative_error(self[twin], self[reference])
            reference = self[reference]
        self.record(stage, actual.dtype, relative_error(actual, reference), limit, original)

    def check_equal(self, stage: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Fail where one element differs."""
        is_equal = actual.shape == expected.shape and torch.equal(actual, expected)
        self.record(stage, actual.dtype, 0.0 if is_equal else float("inf"), 0.0)

    def record(self, stage: str, dtype: torch.dtype, error: float, limit: float, original: float | None = None) -> None:
        """Remember one comparison and fail where its error exceeds `limit`."""
        MEASUREMENTS.append(Measurement(self.name, stage, dtype, error, limit, original))
        assert error <= limit, f"{self.name}, {stage}, {dtype}: relative error {error:.3e} exceeds {limit:.1e}"


def load_golden(name: str) -> Golden:
    """Golden file `name`, else the part of it that comes with the repository; skips the test where there is neither."""
    folder = golden_dir()
    for path in (folder / f"{name}.npz", SMALL_FOLDER / f"{name}.npz"):
        if path.is_file():
            return Golden(path)
    missing = f"file {folder / name}.npz" if folder.is_dir() else f"folder {folder}"
    pytest.skip(f"golden {missing} does not exist (set CMT_AQR_GOLDEN)")


def relative_error(actual, reference) -> float:
    """max |actual - reference| / max |reference|, in float64; inf where shapes or finiteness differ."""
    a, r = (torch.as_tensor(x).detach().cpu().double() for x in (actual, reference))
    if a.shape != r.shape or not torch.equal(torch.isfinite(a), torch.isfinite(r)):
        return float("inf")
    if r.numel() == 0:
        return 0.0
    scale = r.abs().max().item()
    return (a - r).abs().max().item() / (scale if scale > 0 else 1.0)
