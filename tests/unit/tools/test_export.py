"""What cannot be written for deployment is refused with the reason; tests/e2e/test_deployment_files.py has the rest."""

import pytest

from cmt_aqr.tools.export import main as export
from cmt_aqr.tools.run_export import main as run_export
from tests.unit.test_inference import SMALL

CONFIG = "configs/synthetic_tiny.yaml"
SETTINGS = [change for change in SMALL if "score_threshold" not in change]
POINTS = "1000"


def command(folder, *more, settings=()):
    weights = str(folder / "weights.safetensors")
    return [CONFIG, "--checkpoint", weights, "--points", POINTS, *more, "--set", *SETTINGS, *settings]


REFUSED = {
    "flex in ONNX": (["--to", "onnx"], ["model.attention.backend=flex"], "ONNX has no operator for FlexAttention"),
    "score_mod in ONNX": (["--to", "onnx"], ["model.attention.backend=score_mod"], "use --set model.attention.backend"),
    "score_mod": (["--to", "pt2"], ["model.attention.backend=score_mod"], "its tables inside a larger graph"),
    "lowrank": (["--to", "pt2"], ["model.attention.backend=lowrank"], "its sizes depend on values"),
    "spconv": (["--to", "pt2"], ["model.lidar.sparse_backend=spconv"], "model.lidar.sparse_backend=torch"),
    "aliased voxels": (["--to", "pt2"], ["model.lidar.out_of_range=alias"], "model.lidar.out_of_range=drop"),
    "another ending": (["--to", "pt2", "--output", "x.zip"], [], "the name must end with .pt2"),
    "a package of ONNX": (["--to", "onnx", "--package"], [], "--package belongs to --to pt2"),
    "ONNX for a GPU": (["--to", "onnx", "--device", "cuda"], [], "--device cuda belongs to --to pt2"),
    "a token alone": (["--to", "pt2", "--token", "abc"], [], "add --data ROOT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case, tmp_path, capsys):
    options, settings, words = REFUSED[case]
    assert export(command(tmp_path, *options, settings=settings)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_packages_that_are_missing_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("cmt_aqr.tools.export.find_spec", lambda name: None)
    assert export(command(tmp_path, "--to", "onnx")) == 2
    assert "--to onnx needs the package onnx: pip install 'cmt_aqr[onnx]'" in capsys.readouterr().err


def test_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    assert export(command(tmp_path, "--to", "pt2", "--package")) == 2
    assert "--package compiles C++, and there is no compiler" in capsys.readouterr().err


BAD_FILES = {
    "absent.pt2": (None, "no such file"),
    "nonsense.pt2": (b"nonsense", "expected a .pt2 or .onnx file"),
    "nonsense.onnx": (b"nonsense", "cannot load it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_run(name, tmp_path, capsys):
    content, words = BAD_FILES[name]
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="pip install 'cmt_aqr[onnx]'")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run_export([str(tmp_path / name), "bundle", "out.npz"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
