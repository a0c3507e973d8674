"""CMT (camera + LiDAR transformer detector) with the AQR attention bias, in pure PyTorch 2."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmt_aqr.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor"]


def __getattr__(name: str) -> object:
    """``from cmt_aqr import Predictor`` loads torch; ``import cmt_aqr`` does not."""
    if name == "Predictor":
        from cmt_aqr.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'cmt_aqr' has no attribute {name!r}")
