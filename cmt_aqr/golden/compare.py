"""Compare two sets of named tensors stage by stage, and name the first one that differs.

Shape letters: see catalogue.py.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from cmt_aqr.golden.bundle import BundleError, Source
from cmt_aqr.golden.catalogue import STAGES, row_names_of, stage_of
from cmt_aqr.golden.measure import YAW, Difference, Pairing, is_exact, measure, name_table, pair_rows, same_turn

# Share of A's largest value that is the limit where no manifest gives one.
DEFAULT_LIMIT = 1e-5
BOXES = "boxes/boxes.*"


@dataclass(frozen=True)
class Row:
    """The result for one tensor.

    Attributes:
        shape: A's.
        difference: None where the shapes do not fit.
        limit: of the absolute difference; 0 for integers.
        is_exact: True for integers, which must be equal.
        unpaired: rows that only one side has, of tensors whose rows are matched by what identifies them.
        problem: in words, a problem other than values that differ; empty where there is none.
        pairing: of the rows, where they are matched.
    """

    name: str
    shape: tuple[int, ...]
    difference: Difference | None
    limit: float
    is_exact: bool
    unpaired: int = 0
    problem: str = ""
    pairing: Pairing | None = None

    @property
    def is_past(self) -> bool:
        """Past its limit, or not comparable."""
        return bool(self.problem) or self.unpaired > 0 or (self.difference is not None and self.difference.past > 0)


@dataclass(frozen=True)
class Comparison:
    """All rows in the order of the forward pass, and what only one side has; ``factor``: of all limits."""

    rows: list[Row]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    factor: float = 1.0

    @property
    def first_stage(self) -> str | None:
        """The first stage with a row past its limit."""
        return next((stage_of(row.name) for row in self.rows if row.is_past), None)


def compare(a: Source, b: Source, *, factor: float = 1.0) -> Comparison:
    """Compare everything that both have.

    Args:
        factor: all limits are multiplied by it.

    Raises:
        BundleError: the two have no name in common, or a tensor cannot be read.
    """
    both = [name for name in ordered(a.names) if name in b]
    if not both:
        raise BundleError(
            f"{a.path} and {b.path} have no tensor in common: names are stage/tensor such as tokens/values, the second "
            f"has {', '.join(b.names[:3]) or 'none'}"
        )
    pairings = Pairings(a, b, factor)
    rows = [compare_one(name, a, b, factor, pairings.of(name)) for name in both]
    only_a, only_b = [name for name in a.names if name not in b], [name for name in b.names if name not in a]
    return Comparison(rows, only_a, only_b, factor)


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of the stages; within a stage their order is kept."""
    place = {stage: number for number, stage in enumerate(STAGES)}
    return sorted(names, key=lambda name: place.get(stage_of(name), len(place)))


def limit_of(name: str, a: Source, b: Source, factor: float) -> float:
    """Largest absolute difference that is within the limit: the manifest's, else a share of A's largest value."""
    limit = a.entry(name).get("tolerance", {}).get(b.precision)
    return factor * (DEFAULT_LIMIT * largest(a[name]) if limit is None else limit)


class Pairings:
    """Which rows of A and B belong together, found once for all tensors whose rows the same tensors identify."""

    def __init__(self, a: Source, b: Source, factor: float) -> None:
        self._a, self._b, self._factor = a, b, factor
        self._found: dict[tuple[str, ...], Pairing] = {}

    def of(self, name: str) -> Pairing | None:
        """The pairing for a tensor; None where the order of rows has a meaning, or what identifies them is missing."""
        a, b, keys = self._a, self._b, row_names_of(name)
        if not keys or any(key not in a or key not in b for key in keys):
            return None
        if keys not in self._found:
            names = [[source[key] for key in keys] for source in (a, b)]
            if any(is_exact(key) is False for side in names for key in side):
                names = [[key.round() for key in side] for side in names]  # integers that were stored as floats
            if any(x.shape[1:] != y.shape[1:] for x, y in zip(*names, strict=True)):
                return None
            pairing = pair_rows(*map(name_table, names))
            self._found[keys] = self._leave_out_ties(pairing, keys)
        return self._found[keys]

    def _leave_out_ties(self, pairing: Pairing, keys: tuple[str, ...]) -> Pairing:
        """The pairing without unpaired boxes whose score ties with the last one: rounding decides which are kept."""
        scores = f"boxes/scores.{keys[0].rpartition('.')[2]}"
        if stage_of(keys[0]) != "boxes" or scores not in self._a or scores not in self._b or not len(pairing.rows_a):
            return pairing
        kept = [self._a[scores].double(), self._b[scores].double()]
        limit = limit_of(scores, self._a, self._b, self._factor)
        lost = []
        for score, only in zip(kept, (pairing.only_a, pairing.only_b), strict=True):
            lost.append(only[score[only] > score.min() + 2 * limit])
        return Pairing(pairing.rows_a, pairing.rows_b, *lost, pairing.names_a, pairing.names_b)


def compare_one(name: str, a: Source, b: Source, factor: float, pairing: Pairing | None) -> Row:
    """Compare one tensor that both have."""
    shape, exact = tuple(a[name].shape), is_exact(a[name])
    is_paired = pairing is not None and (len(a[name]), len(b[name])) == (len(pairing.names_a), len(pairing.names_b))
    pairing = pairing if is_paired else None
    left, right = aligned(name, a, b, pairing)
    is_name = is_paired and name in row_names_of(name)
    unpaired = len(pairing.only_a) + len(pairing.only_b) if is_name else 0
    limit = 0.0 if exact else limit_of(name, a, b, factor)
    if left.shape != right.shape:
        problem = shape_problem(name, left, right, max(limit, DEFAULT_LIMIT * largest(left)))
        return Row(name, shape, None, limit, exact, problem=problem)
    return Row(name, shape, measure(left, right, limit), limit, exact, unpaired, pairing=pairing)


def aligned(name: str, a: Source, b: Source, pairing: Pairing | None) -> tuple[Tensor, Tensor]:
    """Both tensors as :func:`paired`; angles of boxes that differ by whole turns are made equal."""
    left, right = paired(name, a, b, pairing)
    if fnmatchcase(name, BOXES) and left.shape == right.shape:
        right = right.clone()
        right[:, YAW] = same_turn(left[:, YAW], right[:, YAW])
    return left, right


def paired(name: str, a: Source, b: Source, pairing: Pairing | None) -> tuple[Tensor, Tensor]:
    """Both tensors; with a pairing only the rows that both have, in A's order."""
    left, right = a[name], b[name]
    return (left, right) if pairing is None else (left[pairing.rows_a], right[pairing.rows_b])


def largest(tensor: Tensor) -> float:
    """Largest finite absolute value; 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    wide = tensor if tensor.is_floating_point() else tensor.double()
    found = torch.linalg.vector_norm(wide.reshape(-1), torch.inf).item()
    return found if math.isfinite(found) else wide.nan_to_num(0, 0, 0).abs().max().item()


def shape_problem(name: str, a: Tensor, b: Tensor, limit: float) -> str:
    """The two shapes, and the order of B's axes that gives A's values, if there is one."""
    text = f"shape {tuple(a.shape)} in A, {tuple(b.shape)} in B"
    axes = fitting_axes(a, b, limit)
    return text if axes is None else f"{text}; the same values with --transpose {name}={','.join(map(str, axes))}"


def fitting_axes(a: Tensor, b: Tensor, limit: float) -> tuple[int, ...] | None:
    """An order of B's axes, other than its own, that makes it equal to A within the limit."""
    if a.ndim != b.ndim or not 2 <= a.ndim <= 5 or sorted(a.shape) != sorted(b.shape):
        return None
    for axes in itertools.permutations(range(a.ndim)):
        turned = b.permute(axes)
        if axes != tuple(range(a.ndim)) and turned.shape == a.shape and measure(a, turned, limit).past == 0:
            return axes
    return None


def share_within(a: Tensor, b: Tensor, limit: float) -> float:
    """Share of the elements that agree within a limit; 0 for different shapes and for empty tensors."""
    if a.shape != b.shape or a.numel() == 0:
        return 0.0
    return 1 - measure(a, b, limit).past / a.numel()
