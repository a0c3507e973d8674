"""GridMask against the original's masks, bit for bit (see tests/parity/golden.py)."""

import re

import numpy as np
import torch

from cmt_aqr.models.grid_mask import draw_grid_mask, grid_mask
from tests.parity.golden import load_golden


def test_masks():
    golden = load_golden("gridmask")
    cases = [match for name in golden.names if (match := re.fullmatch(r"seed(\d+)_(\d+)x(\d+)", name))]
    assert cases
    for case in cases:
        seed, height, width = map(int, case.groups())
        draw = draw_grid_mask(np.random.RandomState(seed), height=height)
        assert (draw is not None) == bool(golden[f"seed{seed}_applied"])
        mask = torch.ones(height, width, dtype=torch.bool)
        if draw is not None:
            mask = grid_mask(draw, height=height, width=width)
        golden.check_equal("masks", mask.to(torch.uint8), golden.tensor(case[0]))
