"""The embedded synthetic world: a nuScenes-format dataset out of a seed, for tests and runs without a download."""

from cmt_aqr.synthetic.conditions import Conditions, parse_conditions
from cmt_aqr.synthetic.recording import WorldSettings
from cmt_aqr.synthetic.writer import GENERATOR_VERSION, generate_world

__all__ = ["GENERATOR_VERSION", "Conditions", "WorldSettings", "generate_world", "parse_conditions"]
