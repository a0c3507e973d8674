"""The report of what reduced precision does, on a small detector."""

import re
from pathlib import Path

import pytest

from cmt_aqr.tools.precision_report import main

CONFIG = str(Path(__file__).parents[3] / "configs" / "synthetic_tiny.yaml")
SMALL = (
    "model.num_queries=40", "model.camera.input_size=[64, 64]", "model.camera.base_channels=4",
    "model.lidar.max_voxels_train=2000", "model.lidar.max_voxels_test=2000", "model.lidar.sparse_shape=[21, 64, 64]",
    "model.lidar.voxel_size=[1.6, 1.6, 0.4]", "model.init=official",
)  # fmt: skip


def rows(printed):
    """Stage -> its four figures."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: [float(x) for x in row[1:]] for row in cells[1:]}


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_stages_that_are_rounded_and_stages_that_are_not(capsys, precision):
    arguments = (CONFIG, "--device", "cpu", "--precisions", precision, "--set", *SMALL)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = rows(printed)
    eps = {"bf16": 2**-8, "fp16": 2**-11}[precision]
    for stage in ("token positions", "query positions"):
        assert found[stage] == [0, 0, 0, 0]
    for stage in ("camera maps", "BEV map", "tokens", "AQR weights", "decoder output"):
        largest, mean, relative, alone = found[stage]
        assert largest > mean > 0 and eps / 20 < alone < 40 * eps and relative > 0, stage
    for stage in ("class logits", "box codes, centres left out", "centres (m)"):
        largest, mean, _, alone = found[stage]
        assert largest > mean > 0 and alone == 0, stage
    mean, worst = (float(x) for x in re.search(r"Centres: mean (.*) mm, worst (.*) mm\.", printed).groups())
    assert found["centres (m)"][:2] == pytest.approx([worst / 1000, mean / 1000], rel=0.06)


def test_a_wrong_key_is_one_sentence(capsys):
    assert main((CONFIG, "--device", "cpu", "--set", "model.num_queries=0")) == 2
    assert "model.num_queries" in capsys.readouterr().err
