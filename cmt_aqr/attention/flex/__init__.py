"""The fast evaluator, for a GPU: speed only, nothing else depends on it. ``make_flex_attention`` is the way in.

``packing.py``: the window test on integers. ``partition.py``: shares of the keys. ``schedule.py``: both, and the order
of the queries, as FlexAttention wants them. ``kernel.py``: the call. ``merge.py``: one attention from the partitions'.
"""

from .kernel import make_flex_attention

__all__ = ["make_flex_attention"]
