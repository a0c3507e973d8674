"""Golden bundles that are computed on a GPU: float64 is that of the CPU, and float32 is within the limits."""

import json

import pytest
import torch

from cmt_aqr.golden.__main__ import main
from tests.unit.golden.make_tiny import CONFIG, FOLDER, SETTINGS, export_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Heads of 16 channels, the least that FlexAttention takes.
FRAME = ("--points", "300", "--boxes", "3", "--train")
WIDE = ("--set", *SETTINGS, "model.num_heads=1")


def test_the_shipped_bundle_is_computed_on_a_gpu_too(tmp_path, capsys):
    weights = ("--checkpoint", str(FOLDER / "weights.safetensors"), "--device", "cuda")
    assert export_tiny(tmp_path / "cuda", *weights) == 0
    status = [main(["compare", str(FOLDER), str(tmp_path / "cuda"), "--precision", x]) for x in ("float64", "float32")]
    assert status == [0, 0], capsys.readouterr().out


@pytest.mark.parametrize("backend", ["flex", "score_mod"])
def test_every_evaluator_is_within_the_limits_of_float64(tmp_path, capsys, backend):
    more = ("--dtype", "float64", "float32", "bf16", "--device", "cuda")
    command = ["export", str(CONFIG), str(tmp_path / "cuda"), *FRAME, *more, *WIDE]
    assert main([*command, f"model.attention.backend={backend}"]) == 0
    about = json.loads((tmp_path / "cuda" / "manifest.json").read_text())
    assert {x: about["evaluators"][x]["attention"] for x in about["evaluators"]} == {
        "float64": "dense", "float32": backend, "bf16": backend,
    }  # fmt: skip
    assert about["evaluators"]["float64"]["sparse encoder"] == "torch"
    weights = ("--checkpoint", str(tmp_path / "cuda" / "weights.safetensors"))
    cpu = ["export", str(CONFIG), str(tmp_path / "cpu"), *FRAME, *weights, *WIDE]
    assert main([*cpu, "model.attention.backend=dense"]) == 0
    status = main(["compare", str(tmp_path / "cpu"), str(tmp_path / "cuda"), "--precision", "float32"])
    assert status == 0, capsys.readouterr().out
