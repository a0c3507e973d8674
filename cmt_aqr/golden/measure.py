"""How much two tensors differ, and which rows of two lists belong together."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Elements that are converted to float64 at a time: about what fits into a processor's cache.
CHUNK = 2**17
FLOAT32_BITS = 23
# Column of a box (9) that holds its angle.
YAW = 6


@dataclass(frozen=True)
class Element:
    """One element of both tensors."""

    index: tuple[int, ...]
    a: float
    b: float


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one shape are apart.

    Attributes:
        count: elements.
        max_abs: largest absolute difference; infinite where a value is not finite and the other one is not the same.
        max_rel: max_abs / largest absolute value of A.
        ulp: max_abs in units of the last place that float32 has at the larger of both values there.
        cosine: of the angle between the tensors as vectors; 1 for two of zeros.
        past: number of elements further apart than the limit; for integers, of those that differ.
        first: the first of them in index order; None where there is none.
        worst: the element furthest apart.
    """

    count: int
    max_abs: float
    max_rel: float
    ulp: float
    cosine: float
    past: int
    first: Element | None
    worst: Element | None


def is_exact(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or booleans, which must be equal."""
    return not tensor.is_floating_point()


def measure(a: Tensor, b: Tensor, limit: float) -> Difference:
    """Compare tensors of one shape element by element.

    Args:
        limit: largest absolute difference that is accepted.
    """
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    if a.dtype == b.dtype and torch.equal(flat_a, flat_b):
        return Difference(len(flat_a), 0.0, 0.0, 0.0, 1.0, 0, None, None)
    worst_at, first_at, past, max_abs, largest = 0, None, 0, 0.0, 0.0
    products = torch.zeros(3, dtype=torch.float64)  # a.a, b.b, a.b
    for start in range(0, len(flat_a), CHUNK):
        x, y = (flat[start : start + CHUNK].double() for flat in (flat_a, flat_b))
        apart, size, terms = finite_difference(x, y)
        if not torch.isfinite(terms).all():
            apart = difference(x, y)
            _, size, terms = finite_difference(x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0))
        products += terms
        largest, peak = max(largest, size), apart.max().item()
        if peak > max_abs:
            max_abs, worst_at = peak, start + int(apart.argmax())
        if peak > limit:
            is_past = apart > limit
            past += int(is_past.sum())
            first_at = start + int(is_past.int().argmax()) if first_at is None else first_at

    def element(at: int) -> Element:
        index = tuple(int(i) for i in np.unravel_index(at, tuple(a.shape)))
        return Element(index, flat_a[at].item(), flat_b[at].item())

    return Difference(
        count=len(flat_a),
        max_abs=max_abs,
        max_rel=0.0 if max_abs == 0 else max_abs / largest if largest else math.inf,
        ulp=0.0
        if max_abs == 0
        else max_abs / float32_spacing(max(abs(flat_a[worst_at].item()), abs(flat_b[worst_at].item()))),
        cosine=_cosine(*products.tolist()),
        past=past,
        first=None if first_at is None else element(first_at),
        worst=element(worst_at) if max_abs > 0 else None,
    )


def finite_difference(x: Tensor, y: Tensor) -> tuple[Tensor, float, Tensor]:
    """|x - y|, largest |x|, and the products x.x, y.y, x.y, which are finite only where all values are; float64."""
    terms = torch.stack((torch.dot(x, x), torch.dot(y, y), torch.dot(x, y)))
    return (x - y).abs_(), torch.linalg.vector_norm(x, torch.inf).item(), terms


def difference(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| in float64; 0 where both are the same infinity or both NaN, infinite where only one is not finite."""
    apart = (x - y).abs()
    is_equal = (x == y) | (x.isnan() & y.isnan())
    return apart.nan_to_num(math.inf, math.inf, math.inf).masked_fill(is_equal, 0)


def float32_spacing(value: float) -> float:
    """Distance from a value to the next float32."""
    if not math.isfinite(value):
        return math.inf
    return 2.0 ** (max(math.frexp(value)[1] - 1, -126) - FLOAT32_BITS)


def _cosine(aa: float, bb: float, ab: float) -> float:
    if aa == 0 or bb == 0:
        return 1.0 if aa == bb else 0.0
    return ab / math.sqrt(aa) / math.sqrt(bb)


@dataclass(frozen=True)
class Pairing:
    """Rows of A and of B that are identified by the same numbers.

    Attributes:
        rows_a, rows_b: indices of the rows that both have, in A's order.
        only_a, only_b: indices of rows that only one side has.
        names_a, names_b: (rows, columns) int64, the numbers that identify each row.
    """

    rows_a: Tensor
    rows_b: Tensor
    only_a: Tensor
    only_b: Tensor
    names_a: Tensor
    names_b: Tensor


def name_table(keys: list[Tensor]) -> Tensor:
    """Integer tensors (n,) or (n, columns) side by side: (n, all columns) int64."""
    return torch.cat([key.long().reshape(len(key), math.prod(key.shape[1:])) for key in keys], dim=1)


def pair_rows(names_a: Tensor, names_b: Tensor) -> Pairing:
    """Pair the rows of two tables; of several equal rows, the first ones are paired."""
    if torch.equal(names_a, names_b):
        everyone, nobody = torch.arange(len(names_a)), torch.zeros(0, dtype=torch.int64)
        return Pairing(everyone, everyone, nobody, nobody, names_a, names_b)
    _, number = torch.unique(torch.cat((names_a, names_b)), dim=0, return_inverse=True)
    a, b = number[: len(names_a)].numpy(), number[len(names_a) :].numpy()
    _, rows_a, rows_b = np.intersect1d(a, b, return_indices=True)
    order = np.argsort(rows_a)
    rows_a, rows_b = rows_a[order], rows_b[order]
    only_a, only_b = np.setdiff1d(np.arange(len(a)), rows_a), np.setdiff1d(np.arange(len(b)), rows_b)
    return Pairing(*map(torch.from_numpy, (rows_a, rows_b, only_a, only_b)), names_a, names_b)


def same_turn(reference: Tensor, angle: Tensor) -> Tensor:
    """The angle plus the whole turns (radians) that bring it nearest to the reference."""
    return angle + 2 * math.pi * ((reference - angle) / (2 * math.pi)).round()
