"""float32 on CUDA against the original's float64 numbers; the errors are those of tests/gpu/parity_report.py."""

import pytest
import torch

from tests.gpu.parity_report import CASES, format_error, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-"))
def test_float32_equals_the_original(case):
    if not case.path.is_file():
        pytest.skip(f"golden file {case.path} does not exist")
    stages = measure(case, torch.device("cuda"))
    assert stages
    assert not {name: format_error(stage) for name, stage in stages.items() if not stage.passes}
