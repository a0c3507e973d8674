"""docs/porting.md and a bundle suffice: a port written from them agrees with the detector, stage by stage."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmt_aqr.config import load_config
from cmt_aqr.golden.__main__ import main
from cmt_aqr.golden.case import draw_detector, random_frame
from cmt_aqr.golden.export import Choice, export
from tests.port_numpy.port import main as port
from tests.unit.golden.make_tiny import CONFIG, FOLDER, SETTINGS

HERE = Path(__file__).resolve().parent
# Settings on top of the tiny bundle's, each bundle with what the others lack.
# The range of heights makes some points invisible to all cameras.
HIGH = ("model.point_range=[-51.2, -51.2, -20.0, 51.2, 51.2, 20.0]", "model.lidar.voxel_size=[2.048, 2.56, 4.0]")
OTHERS = {
    "all cameras": (
        *HIGH, "model.init=local", "model.tasks=[[car, truck, construction_vehicle, bus, trailer, barrier, motorcycle, "
        "bicycle, pedestrian, traffic_cone]]", "model.aqr.camera_assignment=all", "model.aqr.unseen=corner",
        "model.aqr.bev_window=4", "model.aqr.camera_window=1", "model.aqr.num_layers=2",
        "model.aqr.activation=sigmoid", "model.aqr.learn_scale=false", "model.aqr.scale=4.0",
        "model.aqr.max_bias=0.8", "evaluation.score_threshold=0.023",
        "evaluation.post_range=[-40.0, -30.0, -10.0, 30.0, 40.0, 2.0]",
    ),
    "first camera": (*HIGH, "model.aqr.camera_window=2", "model.aqr.num_layers=2"),
    "all tokens": ("model.aqr.local=false", "model.aqr.max_bias=null"),
    "v1": (*HIGH, "model.aqr.design=v1", "model.aqr.activation=sigmoid"),
    "v2": ("model.aqr.design=v2", "model.aqr.activation=sigmoid", "model.aqr.camera_assignment=all"),
    "LiDAR alone": ("model.camera=null", "model.aqr=null", "model.head_kernel=3"),
    "cameras alone": ("model.lidar=null", "model.aqr=null"),
}  # fmt: skip

# Mistake of the port: the stage that differs first, and words that name it.
MISTAKES = {
    "x before y in the sine embedding": ("positions", "the sine embedding has y before x (quirk Q3)"),
    "corners of BEV cells": ("positions", "half-pixel offset: BEV cells are embedded at their centres"),
    "centres of camera cells": ("positions", "half-pixel offset: rays start at the corners of camera cells"),
    "rows and columns of windows": ("windows", "rows and columns are swapped"),
    "stretched windows": ("windows", "stretched windows: the point range was divided by the number of cells"),
    "last camera": ("windows", "the window is in the last camera that sees the point"),
    "even windows": (
        "aqr",
        "window radius: it is size // 2 cells to every side, windows of camera reach one cell less",
    ),
    "sigmoid for tanh": ("aqr", "the activation of the weights is tanh, not sigmoid"),
    "layer norm eps": ("aqr", "the layer norms have an eps of 1e-6"),
    "sign of the scale": ("bias", "the sign of the bias"),
    "no clamp": ("bias", "the bias was not clamped to 0.8"),
    "no softmax scale": ("decoder", "the scores were not divided by sqrt(D)"),
    "lse to base 2": ("decoder", "this lse has base 2, expected the natural logarithm"),
    "norm before the residual": ("decoder", "the norm was taken before the residual sum"),
    "shared norm in the chain": ("decoder", "the next layer is given the output without it (quirk Q7)"),
    "no inverse sigmoid": ("heads", "the reference point was added without its inverse sigmoid"),
    "box code order": ("boxes", "read as cx cy cz log-l log-w log-h"),
    "yaw sign": ("boxes", "yaw sign: the angle is counter-clockwise about +z"),
    "sigmoid twice": ("boxes", "sigmoid twice: the values are scores already"),
}
# Mistakes that the tiny bundle cannot show: all its windows are odd, and its bias is far from its limit.
SHOWN_BY = {"even windows": "first camera", "no clamp": "all cameras"}


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory):
    """Bundles of other configurations, written when they are first asked for."""
    folder = tmp_path_factory.mktemp("bundles")

    def write(name):
        path = folder / name
        if path.exists():
            return path
        config = load_config(str(CONFIG), [*SETTINGS, *OTHERS[name]])
        frame = random_frame(config, num_points=200, num_boxes=3)
        choice = Choice(["float64", "float32"], is_training=True, gradients=())
        export(config, draw_detector(config, config.seed, frame), frame, choice, path)
        return path

    return write


@pytest.fixture
def compared(tmp_path, capsys):
    """Run the port on a bundle and compare what it writes; exit status and report."""

    def run(bundle, dtype="float64", mistake=""):
        out = tmp_path / "port.safetensors"
        port([str(bundle), str(out), "--dtype", dtype, "--mistake", mistake])
        capsys.readouterr()
        status = main(["compare", str(bundle), str(out), "--precision", dtype])
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_port_agrees_with_the_shipped_bundle(dtype, compared):
    status, text = compared(FOLDER, dtype)
    assert status == 0, text
    missing = text.partition("not in B: ")[2].partition("\n")[0]
    assert [part.split()[0] for part in missing.split(", ")] == [
        "inputs", "weights", "voxels", "lidar", "images", "denoising", "losses", "gradients",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_port_agrees_with_bundles_of_other_configurations(name, other_bundle, compared):
    bundle = other_bundle(name)
    for dtype in ("float64", "float32"):
        status, text = compared(bundle, dtype)
        assert status == 0, text
        assert "not in A" not in text
        left = {part.split("/")[0].split()[0] for part in text.partition("not in B: ")[2].split(", ")}
        assert left <= {"inputs", "weights", "voxels", "lidar", "images", "denoising", "losses", "gradients"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_fails_at_its_stage_and_is_named(mistake, other_bundle, compared):
    stage, words = MISTAKES[mistake]
    bundle = other_bundle(SHOWN_BY[mistake]) if mistake in SHOWN_BY else FOLDER
    status, text = compared(bundle, mistake=mistake)
    assert status == 1
    assert f"first stage that differs: {stage}\n" in text
    causes = text.split("likely cause: ")[1:]
    assert causes and all(words in cause for cause in causes), text


def test_the_port_imports_numpy_and_safetensors_alone():
    files = [path for path in HERE.glob("*.py") if not path.name.startswith("test_")]
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path.name} reaches outside its folder"
    assert names == {"argparse", "json", "math", "pathlib", "numpy", "safetensors.numpy"}


def test_the_port_runs_where_neither_the_package_nor_torch_can_be_imported(tmp_path):
    code = (
        "import sys; sys.modules.update({'cmt_aqr': None, 'torch': None})\n"
        "from tests.port_numpy.port import main\nmain(sys.argv[1:])\n"
        "assert not [name for name in sys.modules if name.startswith(('cmt_aqr.', 'torch.'))]"
    )
    out = tmp_path / "port.safetensors"
    command = [sys.executable, "-c", code, str(FOLDER), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["compare", str(FOLDER), str(out), "--precision", "float64"]) == 0
