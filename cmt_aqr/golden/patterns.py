"""Likely causes of a difference, in words. Each is tried: only a mistake that explains the difference is named."""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from cmt_aqr.golden import layer_mistakes, mistakes
from cmt_aqr.golden.bundle import Source
from cmt_aqr.golden.catalogue import stage_of
from cmt_aqr.golden.compare import Comparison, Row, aligned, largest, paired, share_within
from cmt_aqr.golden.measure import is_exact, measure

# A mistake has to explain at least this share of the elements that are past their limit.
EXPLAINED = 0.9
# Accepted remainder as a share of the largest value: a mistake repeated with A's rounded numbers is not exact.
LOOSE = 2e-5
# Accepted remainder as a share of the largest difference, which a mistake must explain almost fully.
LEFT = 0.05
# Of several mistakes of one kind that explain a difference, those are named whose remainder is at most this many times
# the smallest.
CLOSE = 10

# In which tensors each mistake can show, as patterns of names.
PATTERNS: tuple[tuple[tuple[str, ...], Callable[[mistakes.Case], mistakes.Attempts]], ...] = (
    (("windows/*",), mistakes.bev_windows),
    (("windows/camera",), mistakes.camera_choice),
    (("windows/*", "lidar/*", "images/*"), mistakes.rows_and_cols),
    (("voxels/coords",), mistakes.voxel_axes),
    (("tokens/*", "aqr/tokens"), mistakes.token_order),
    (("inputs/*", "images/*", "cameras/*", "queries/pixels", "queries/is_seen", "positions/rays"), mistakes.view_order),
    (("positions/bev_*", "queries/*points", "queries/sine", "inputs/points.*"), mistakes.x_and_y),
    (("tokens/positions", "queries/positions"), mistakes.embedded_x_and_y),
    (("positions/*",), mistakes.half_cell),
    (("images/input",), mistakes.channel_order),
    (("boxes/boxes.*",), mistakes.box_code),
    (("boxes/boxes.*",), mistakes.other_angle),
    (("boxes/scores.*", "heads/*.center"), mistakes.sigmoids),
    (("aqr/weights",), mistakes.weight_activation),
    (("decoder/*.lse", "boxes/boxes.*"), mistakes.log_base),
    (("bias/values",), mistakes.bias_limits),
    (("decoder/*.output",), mistakes.shared_norm),
    (("aqr/weights",), layer_mistakes.generator),
    (("decoder/layer*",), layer_mistakes.decoder_layer),
    (("heads/*.center", "heads/*.height"), layer_mistakes.reference),
    (("*",), mistakes.anything),
)


def likely_causes(comparison: Comparison, a: Source, b: Source) -> dict[str, list[str]]:
    """Name of a tensor of the first stage that differs -> causes that explain it, the specific ones first."""
    stage, found = comparison.first_stage, {}
    past = [row for row in comparison.rows if row.is_past and stage_of(row.name) == stage]
    for row in past:
        causes = causes_of(row, a, b, is_first=row is past[0])
        if causes:
            found[row.name] = causes
    return found


def causes_of(row: Row, a: Source, b: Source, *, is_first: bool) -> list[str]:
    """Causes that explain the difference of one tensor; a general one only where there is no specific one.

    Args:
        is_first: whether it is the first tensor of its stage that differs.
    """
    left, right = aligned(row.name, a, b, row.pairing)
    _, given = paired(row.name, a, b, row.pairing)
    rows = None if row.pairing is None else row.pairing.rows_a
    case = mistakes.Case(row.name, a, left, right, given, rows, is_first)
    if row.unpaired:
        case = mistakes.Case(row.name, a, a[row.name], b[row.name], b[row.name], is_first=is_first)
    is_whole = row.difference is None or row.unpaired
    past = 1.0 if is_whole else row.difference.past / row.difference.count
    apart = math.inf if is_whole else row.difference.max_abs
    causes: list[str] = []
    for names, attempts in PATTERNS:
        if any(fnmatchcase(row.name, name) for name in names) and not (causes and attempts is mistakes.anything):
            fitting = [attempt for attempt in attempts(case) if explains(*attempt[1:], past, row.limit, apart)]
            causes += closest(fitting, row.limit)
    return list(dict.fromkeys(causes))


def closest(fitting: Sequence[tuple[str, Tensor, Tensor]], limit: float) -> list[str]:
    """Words of the mistakes of one kind that explain most: two values of eps, say, may both explain a difference."""
    left = [measure(x, y, limit).max_abs for _, x, y in fitting]
    return [words for (words, *_), rest in zip(fitting, left, strict=True) if rest <= max(limit, CLOSE * min(left))]


def explains(x: Tensor, y: Tensor, past: float, limit: float, apart: float) -> bool:
    """Whether x and y agree, apart from a small share of the elements that were past their limit before.

    Args:
        past: share of the elements that were past their limit.
        apart: the largest difference before; infinite where it is not a number.
    """
    loose = 0.0 if is_exact(x) and is_exact(y) else max(limit, min(LOOSE * largest(x), LEFT * apart))
    return x.shape == y.shape and 1 - share_within(x, y, loose) <= (1 - EXPLAINED) * past
