"""Arrays as positions in a stream of random numbers: how the golden files of the repository stay small.

The original programs drew their inputs and weights with ``torch.manual_seed``. PyTorch's generator on a CPU is the
Mersenne Twister that NumPy has, too, so an array is kept as seed, position and law of its draw, and the differences in
the last bits, which are mostly 0: normal numbers depend on the logarithm and the cosine of the machine.
"""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

UNIT = 2.0**24  # a float32 draw has so many values
STREAM_LENGTH = 1_200_000
BLOCK = 16  # PyTorch draws normal numbers in blocks: 8 radii, 8 angles
# Draws that fit are looked for in the streams of the case's seed and the next two.
NUM_SEEDS = 3
# Differences that the rounding of PyTorch's own arithmetic explains.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Draw:
    """Numbers ``shift + scale * x``, x uniform in [0, 1) or of the standard normal law, from a position of a stream."""

    law: Literal["uniform", "normal"]
    seed: int
    start: int
    shape: tuple[int, ...]
    scale: float
    shift: float

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def numbers(self) -> np.ndarray:
        """float32, of the shape; equal to PyTorch's but for the last bits."""
        size = self.size
        x = stream(self.seed)[self.start : self.start + size].astype(np.float64)
        if self.law == "normal":
            x = normal(x)
            if size % BLOCK:  # PyTorch draws the last block anew
                more = stream(self.seed)[self.start + size : self.start + size + BLOCK].astype(np.float64)
                x = np.concatenate((x[: size - BLOCK], normal(more)))
            x = x.astype(np.float32).astype(np.float64)
        # PyTorch multiplies and adds in float32 with one rounding.
        made = np.float64(np.float32(self.shift)) + np.float64(np.float32(self.scale)) * x
        return made.astype(np.float32).reshape(self.shape)

    def to_json(self) -> list:
        """The fields in their order."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, fields: list) -> "Draw":
        """The inverse of :meth:`to_json`."""
        law, seed, start, shape, scale, shift = fields
        return cls(law, seed, start, tuple(shape), scale, shift)


@lru_cache(maxsize=8)
def stream(seed: int) -> np.ndarray:
    """The uniform float32 numbers of ``torch.manual_seed(seed)``, in [0, 1)."""
    bits = np.random.RandomState(seed).randint(0, 2**32, size=STREAM_LENGTH, dtype=np.uint32)
    return ((bits & (2**24 - 1)) / UNIT).astype(np.float32)


def normal(u: np.ndarray) -> np.ndarray:
    """Box and Muller's transform, block by block; an unfinished block at the end stays as it is."""
    blocks = u[: len(u) // BLOCK * BLOCK].reshape(-1, 2, BLOCK // 2)
    radius, angle = np.sqrt(-2 * np.log1p(-blocks[:, 0])), 2 * np.pi * blocks[:, 1]
    made = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).ravel()
    return np.concatenate((made, u[len(made) :]))


def find_draw(array: np.ndarray, seed: int) -> Draw | None:
    """How a float32 array was drawn; None: it was not, or not by a law that is known."""
    if array.dtype != np.float32 or array.size < 3:
        return None
    for law, scale, shift in laws(array.shape):
        values = (array.ravel()[:BLOCK].astype(np.float64) - shift) / scale
        if law == "normal":
            if array.size < BLOCK:
                continue
            expected = -np.expm1(-(values[:2] ** 2 + values[8:10] ** 2) / 2)  # of which the radii are made
        else:
            expected = values[:3]
        for candidate in range(seed, seed + NUM_SEEDS):
            numbers = stream(candidate)
            fits = np.logical_and.reduce(
                [np.abs(numbers[k : len(numbers) - BLOCK + k] - value) < TOLERANCE for k, value in enumerate(expected)]
            )
            for start in np.flatnonzero(fits):
                draw = Draw(law, candidate, int(start), array.shape, scale, shift)
                made = draw.numbers()
                if made.shape == array.shape and np.abs(made - array).max() < TOLERANCE:
                    return draw
    return None


def laws(shape: tuple[int, ...]) -> Iterator[tuple[str, float, float]]:
    """Law, scale and shift of what the original programs draw: initial weights, inputs, randomised norms."""
    if len(shape) > 1:
        fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
        for bound in (math.sqrt(6 / (fan_in + fan_out)), 1 / math.sqrt(fan_in)):
            yield "uniform", 2 * bound, -bound
        yield "normal", 1 / math.sqrt(fan_in), 0.0
    yield from (("uniform", 1.0, 0.0), ("uniform", 0.8, 0.6), ("uniform", 1.0, 0.5))
    yield from (("normal", scale, 0.0) for scale in (1.0, 0.1, 0.2))


def last_bits(array: np.ndarray, draw: Draw) -> np.ndarray:
    """The differences between a float32 array and its draw, in units of the last bit; int32, in one row."""
    return (array.view(np.int32) - draw.numbers().view(np.int32)).ravel()


def restore(draw: Draw, bits: np.ndarray) -> np.ndarray:
    """The float32 array of a draw and its differences."""
    return (draw.numbers().view(np.int32) + bits.reshape(draw.shape)).view(np.float32)
