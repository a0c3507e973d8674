"""Sizes of a box and of a box code, and which boxes count; the components are in :mod:`cmt_aqr.boxes`.

Apart from it, so that a configuration is read and checked without PyTorch, which takes seconds to import.
"""

from typing import Literal

BOX_SIZE = 9
CODE_SIZE = 10
# Boxes that hold at least one point of these sensors in the key frame (by the counts of the tables), or all.
BoxChoice = Literal["lidar", "lidar_or_radar", "all"]
