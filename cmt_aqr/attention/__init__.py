"""Cross-attention with a bias in windows: torch and the standard library only, usable alone.

``query_windows`` finds each query's windows, ``AttentionBias`` says what is added to the scores there, ``attend``
computes the attention. See docs/architecture.md and the example in README.md.
"""

from cmt_aqr.attention.bias import AttentionBias, bias_strength
from cmt_aqr.attention.evaluate import Attend, Backend, attend, make_attend
from cmt_aqr.attention.flex import padded_length
from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.windows import QueryWindows, WindowSettings, query_windows

__all__ = [
    "Attend",
    "AttentionBias",
    "Backend",
    "QueryWindows",
    "TokenLayout",
    "WindowSettings",
    "attend",
    "bias_strength",
    "make_attend",
    "padded_length",
    "query_windows",
]
