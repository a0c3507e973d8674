"""Files written for deployment give the numbers of the detector, stage by stage."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmt_aqr.classes import CLASSES
from cmt_aqr.golden.__main__ import main as golden
from cmt_aqr.tools.export import main as export
from cmt_aqr.tools.run_export import load
from cmt_aqr.tools.run_export import main as run_export
from tests.unit.tools.test_export import CONFIG, POINTS, SETTINGS, command

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Every stage of a small detector, and its weights."""
    folder = tmp_path_factory.mktemp("export") / "bundle"
    assert golden(["export", CONFIG, str(folder), "--points", POINTS, "--set", *SETTINGS]) == 0
    return folder


def assert_agrees(bundle, file, capsys):
    """The file's boxes and all stages in front of them are within the limits of the bundle."""
    out = file.with_suffix(".npz")
    assert run_export([str(file), str(bundle), str(out)]) == 0
    capsys.readouterr()
    assert golden(["compare", str(bundle), str(out)]) == 0
    text = capsys.readouterr().out
    assert "all 15 tensors are within their limits" in text and "heads/task0.cls_logits" in text


def test_a_torch_export_program(bundle, tmp_path, capsys):
    file = tmp_path / "small.pt2"
    assert export(command(bundle, "--to", "pt2", "--stages", "--output", str(file))) == 0
    said = capsys.readouterr().out
    assert "torch.export program of synthetic_tiny" in said and "lidar2img: float64 1 x 6 x 4 x 4" in said
    assert_agrees(bundle, file, capsys)
    model, about = load(file)
    assert about["inputs"] == "images points lidar2img" and about["classes"].startswith("car truck ")
    sizes = list(map(int, about["sizes"].split()))
    with torch.inference_mode():
        empty = model({
            "images": torch.zeros(1, 6, 64, 160, 3, dtype=torch.uint8),
            "points": torch.full(tuple(map(int, about["input points"].split(":")[0].split()[1::2])), torch.nan),
            "lidar2img": torch.eye(4, dtype=torch.float64).expand(1, 6, 4, 4),
        })  # fmt: skip
    assert empty["needed"].tolist() == [0] * len(sizes) and empty["boxes"].isfinite().all()


def test_an_onnx_model(bundle, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="pip install 'cmt_aqr[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'cmt_aqr[onnx]'")
    file = tmp_path / "small.onnx"
    assert export(command(bundle, "--to", "onnx", "--stages", "--output", str(file))) == 0
    assert "ONNX model (opset 20) of synthetic_tiny" in capsys.readouterr().out
    assert_agrees(bundle, file, capsys)


def test_a_package_in_python_and_in_cpp(bundle, tmp_path, capsys):
    file = tmp_path / "small.package.pt2"
    if export(command(bundle, "--to", "pt2", "--package", "--stages", "--output", str(file))):
        pytest.skip(capsys.readouterr().err)
    assert "AOTInductor package of synthetic_tiny" in capsys.readouterr().out
    assert_agrees(bundle, file, capsys)
    found = np.load(file.with_suffix(".npz"))
    program = build_example(tmp_path)
    inputs = load_file(bundle / "inputs.safetensors")
    for name in ("images", "points.0", "lidar2img"):
        inputs[f"inputs/{name}"].numpy().tofile(tmp_path / f"{name.partition('.')[0]}.bin")
    printed = subprocess.run([program, file, tmp_path], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == len(found["boxes/labels.0"]) > 10
    for line, label, score, box in zip(
        printed, *(found[f"boxes/{name}.0"] for name in ("labels", "scores", "boxes")), strict=True
    ):
        name, *numbers = line.split()
        assert name == CLASSES[label]
        np.testing.assert_allclose(np.array(numbers, float), [score, *box], rtol=0, atol=2e-3)
    (tmp_path / "points.bin").unlink()
    failed = subprocess.run([program, file, tmp_path], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr == f"error: {tmp_path}/points.bin: cannot be opened\n"


def build_example(folder):
    """The program of examples/cpp, built with the headers and libraries of the installed torch."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    torch_folder = torch.__path__[0]
    for line in (
        ["cmake", "-S", "examples/cpp", "-B", folder / "build", f"-DTORCH={torch_folder}"],
        ["cmake", "--build", folder / "build"],
    ):
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "detect"
