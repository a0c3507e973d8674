"""Attention over BEV and camera tokens. Torch and the standard library only, so that the folder can be copied out."""

from cmt_aqr.attention.layout import TokenLayout

__all__ = ["TokenLayout"]
