"""The latency of a file for deployment is measured with the frame and the weights of a bundle."""

import time

import pytest
import torch

from cmt_aqr.golden.__main__ import main as golden
from cmt_aqr.golden.bundle import Source
from cmt_aqr.tools.run_export import main as run_export
from cmt_aqr.tools.time_export import latency_table
from tests.unit.tools.test_export import CONFIG, SETTINGS

ABOUT = {"config": "synthetic_tiny", "device": "cpu", "precision": "fp32", "form": "torch.export program"}
ROWS = 1024


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("time") / "bundle"
    more = ("--points", "1000", "--dtype", "float32", "--stages", "boxes")
    assert golden(["export", CONFIG, str(folder), *more, "--set", *SETTINGS]) == 0
    return Source(folder)


def test_every_call_begins_with_the_frame_and_the_ratio_is_to_the_pipeline(bundle):
    seen = []

    def slow_model(inputs):
        time.sleep(0.3)
        seen.append({name: x.clone() for name, x in inputs.items()})
        inputs["points"].fill_(7.0)  # the next call must not see this
        return {"boxes": inputs["lidar2img"]}

    inputs = {
        "images": bundle["inputs/images"],
        "lidar2img": bundle["inputs/lidar2img"],
        "points": torch.zeros(1, ROWS, 5),
    }
    *head, pipeline, program = latency_table(slow_model, ABOUT, inputs, bundle, repeats=2, compiled=False)
    assert head[0].startswith("synthetic_tiny, CPU") and "fp32" in head[0] and len(head) == 3
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in (pipeline, program)}
    assert list(cells) == ["pipeline", "torch.export program"]
    assert cells["pipeline"][-1] == "1.00" and 300 <= float(cells["torch.export program"][0]) < 900
    ratio = float(cells["torch.export program"][0]) / float(cells["pipeline"][0])
    assert float(cells["torch.export program"][-1]) == pytest.approx(ratio, rel=0.05)
    assert len(seen) >= 2 and bundle["inputs/points.0"].shape == (1000, 5)
    for given in seen:
        assert torch.equal(given["images"], bundle["inputs/images"])
        assert torch.equal(given["points"][0, :1000], bundle["inputs/points.0"])
        assert given["points"][0, 1000:].isnan().all()


@pytest.mark.parametrize(
    ("value", "problem"),
    [("0", "at least 1, got 0"), ("-1", "at least 1, got -1"), ("2.5", "a whole number, got '2.5'")],
)
def test_a_count_is_a_whole_number_above_0(value, problem, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_export(["model.pt2", "bundle", "out.npz", "--time", value])
    assert f"argument --time: expected {problem}\n" in capsys.readouterr().err
