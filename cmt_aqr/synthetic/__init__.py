"""The embedded synthetic world: a nuScenes-format dataset out of a seed, for tests and runs without a download."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmt_aqr.synthetic.conditions import Conditions, parse_conditions
    from cmt_aqr.synthetic.recording import WorldSettings
    from cmt_aqr.synthetic.writer import GENERATOR_VERSION, generate_world

__all__ = ["GENERATOR_VERSION", "Conditions", "WorldSettings", "generate_world", "parse_conditions"]

_MODULES = {
    "Conditions": "conditions",
    "parse_conditions": "conditions",
    "WorldSettings": "recording",
    "GENERATOR_VERSION": "writer",
    "generate_world": "writer",
}


def __getattr__(name: str) -> object:
    """The names above load numpy and OpenCV; ``python -m cmt_aqr.synthetic --help`` does not."""
    if name not in _MODULES:
        raise AttributeError(f"module 'cmt_aqr.synthetic' has no attribute {name!r}")
    return getattr(import_module(f"cmt_aqr.synthetic.{_MODULES[name]}"), name)
