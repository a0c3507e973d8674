"""Cross-attention with a bias in windows: torch and the standard library only, usable alone.

``query_windows`` finds each query's windows, ``AttentionBias`` holds what is added to the scores there, ``attend``
computes the attention. See docs/architecture.md and the example in README.md.
"""

from .bias import AttentionBias, bias_values
from .evaluate import AttendWithLse, Backend, attend, make_attend
from .grids import Grid, TokenLayout
from .windows import QueryWindows, WindowSettings, query_windows

__all__ = [
    "AttendWithLse",
    "AttentionBias",
    "Backend",
    "Grid",
    "QueryWindows",
    "TokenLayout",
    "WindowSettings",
    "attend",
    "bias_values",
    "make_attend",
    "query_windows",
]
