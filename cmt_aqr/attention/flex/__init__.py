"""The fast evaluator, for a GPU: speed only, nothing else depends on it. ``make_flex_attention`` is its one function.

``packing.py``: the window test on integers. ``partition.py``: key partitions of equal cost. ``schedule.py``: both, and
the order of the queries, in FlexAttention's form. ``kernel.py``: the call. ``merge.py``: the partitions' results
merged into one attention.
"""

from .kernel import make_flex_attention

__all__ = ["make_flex_attention"]
