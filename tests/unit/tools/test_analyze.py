"""Summaries of AQR's weights, by hand."""

import json

import numpy as np
import pytest
import torch

from cmt_aqr.attention import QueryWindows, TokenLayout, WindowSettings
from cmt_aqr.attention.grids import Grid
from cmt_aqr.inspection import Inspection, LayerAttention
from cmt_aqr.predictions import Predictions
from cmt_aqr.tools.analyze import attention_rows, condition_of, grouped, query_rows, summary
from cmt_aqr.viz.analysis_figures import draw_attention, draw_weights


def inspection() -> Inspection:
    """Three queries: a car at 5 m, a bus at 50 m, a weak pedestrian; two tasks."""
    logits = [torch.full((1, 1, 3, 2), -9.0), torch.full((1, 1, 3, 8), -9.0)]
    logits[1][0, 0, 0, 3], logits[0][0, 0, 1, 1], logits[1][0, 0, 2, 0] = 2.0, 1.0, -5.0
    tasks = []
    for offset, own in zip((0.0, 100.0), logits, strict=True):
        centre = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 1.0]])[None, None]
        # Boxes of the other task are elsewhere: the class's own task must be read.
        centre = torch.where(own.amax(-1, keepdim=True) > -9, centre, centre + 200 + offset)
        parts = {"center": centre, "height": torch.zeros(1, 1, 3, 1), "dim": torch.zeros(1, 1, 3, 3)}
        parts |= {"rot": torch.ones(1, 1, 3, 2), "vel": torch.zeros(1, 1, 3, 2), "cls_logits": own}
        tasks.append(parts)
    predictions = Predictions(tuple(tasks), ((1, 3), (8, 2, 4, 0, 5, 6, 7, 9)))
    weights = torch.tensor([[[0.5, -0.5], [0.25, float("nan")], [0.9, 0.9]]])
    ones = torch.ones(1, 3)
    pair = torch.stack((ones * torch.tensor([0.2, 0.4, 9.0]), ones), dim=-1)
    layer = LayerAttention(ones * torch.tensor([0.1, 0.3, 9.0]), pair, pair * 2, pair * 3, pair * 4)
    layout = TokenLayout((Grid("lidar", 1, 4, 4, origin=(0.0, 0.0), cell_size=(1.0, 1.0)), Grid("camera", 1, 2, 2)))
    cells = torch.zeros(1, 3, 1, 3, dtype=torch.int64)
    windows = QueryWindows(layout, WindowSettings({"lidar": 1, "camera": 1}), (cells, cells))
    return Inspection(predictions, weights, weights * 2, windows, [layer])


def test_every_query_with_its_class_score_and_distance():
    rows = query_rows(inspection())
    assert rows["label"].tolist() == [0, 3, 8]
    assert rows["score"] == pytest.approx(torch.tensor([2.0, 1.0, -5.0]).sigmoid().numpy())
    assert rows["distance"] == pytest.approx([5, 50, 1])
    assert rows["weights"][:, 0] == pytest.approx([0.5, 0.25, 0.9])


def test_attention_of_the_objects_only():
    (row,) = attention_rows(inspection(), np.array([True, True, False]))
    assert row["change"] == pytest.approx([0.2])
    assert row["mass"] == pytest.approx([0.3, 1.0]) and row["plain_window_mass"] == pytest.approx([1.2, 4.0])


def test_groups(tmp_path):
    rows = query_rows(inspection())
    found = grouped(rows, np.array(["night", "day, dry", "night"], dtype=object))
    assert found["lidar"]["all"]["mean"] == pytest.approx(0.55) and found["camera"]["all"]["count"] == 2
    assert found["lidar"]["by_class"]["bus"]["q50"] == 0.25 and found["camera"]["by_class"]["bus"]["mean"] is None
    assert found["lidar"]["by_distance"]["40-55 m"]["count"] == 1
    assert found["lidar"]["by_distance"]["0-10 m"]["mean"] == pytest.approx(0.7)
    assert found["camera"]["by_condition"]["night"]["mean"] == pytest.approx(0.2)
    json.dumps(found, allow_nan=False)
    layers = attention_rows(inspection(), np.array([True, True, True]))
    variants = {
        "clean": {"weights": found, "attention_by_layer": layers},
        "fog:1": {"weights": found, "attention_by_layer": []},
    }
    for draw, name in ((draw_weights, "weights.png"), (draw_attention, "attention.png")):
        assert draw(variants, tmp_path / name, title="t").read_bytes()[:4] == b"\x89PNG"


def test_quantiles():
    found = summary(np.array([np.nan, *range(101)]))
    assert found == {"count": 101, "mean": 50.0, "q05": 5.0, "q25": 25.0, "q50": 50.0, "q75": 75.0, "q95": 95.0}


@pytest.mark.parametrize(
    ("description", "condition"),
    [
        ("Night, after rain, many peds", "night and rain"),
        ("Wait at intersection, training, train station", "day, dry"),
        ("synthetic; light=night; weather=clear; camera_dirt=none", "night"),
        ("Rainy, construction", "rain"),
    ],
)
def test_conditions(description, condition):
    assert condition_of(description) == condition
