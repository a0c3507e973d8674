"""The maps that are drawn of single queries, against the attention summed token by token elsewhere."""

import numpy as np
import pytest
import torch

from cmt_aqr.attention_maps import MapRecorder, query_maps
from cmt_aqr.boxes import Detections
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.found import Found
from cmt_aqr.inspection import inspect
from cmt_aqr.viz.query_panels import draw_queries, heat
from tests.unit.test_inspection import CONFIG, SMALL, bias_by_hand, small_case


def test_one_layer_of_chosen_queries_token_by_token():
    q, k, bias = small_case()
    recorder = MapRecorder(torch.tensor([2, 0]))
    recorder(q, torch.cat((k, torch.full((1, 2, 5, 4), 9.0)), dim=2), bias, bias.windows)
    scores = (q[0] @ k[0].transpose(-1, -2)) / 2
    for got, added in ((recorder.plain[0], 0), (recorder.biased[0], bias_by_hand())):
        torch.testing.assert_close(got, (scores + added).softmax(dim=-1).mean(dim=0)[[2, 0]])


def maps_case():
    """A detector whose weights are not zero, its input, and detections of queries 5, 9, 5."""
    torch.manual_seed(0)
    model = build_detector(load_config(CONFIG, SMALL).model).eval()
    with torch.no_grad():
        for parameter in model.aqr.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randint(0, 255, (1, 6, 32, 96, 3), dtype=torch.uint8)
    points = [torch.rand(500, 5) * torch.tensor([80.0, 80, 2, 1, 0]) - torch.tensor([40.0, 40, 1, 0, 0])]
    turns = torch.arange(6) * torch.pi / 3
    lidar2img = torch.eye(4, dtype=torch.float64).repeat(1, 6, 1, 1)
    lidar2img[0, :, 0, 0], lidar2img[0, :, 0, 1] = (
        40 * turns.cos() + 48 * turns.sin(),
        48 * turns.cos() - 40 * turns.sin(),
    )
    lidar2img[0, :, 1] = torch.tensor([0.0, 0, -40, 0])
    lidar2img[0, :, 2] = torch.stack((turns.sin(), turns.cos(), 0 * turns, 0 * turns), dim=1)
    boxes = torch.tensor([[3.0, 8, 0, 4, 2, 1.5, 0, 0, 0]] * 3)
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 3, 1]))
    found = Found(detections, torch.tensor([5, 9, 5]), None)
    return model, (images, points, lidar2img), found


@pytest.fixture(scope="module")
def seen():
    """The case, and what inspection finds."""
    model, inputs, found = maps_case()
    return model, inputs, found, inspect(model, *inputs)


def test_maps_add_up_to_what_the_inspection_reports(seen):
    model, inputs, found, inspection = seen
    maps = query_maps(model, *inputs, found, 3)
    assert [one.caption.split(":")[0] for one in maps] == ["car 0.90", "bus 0.80"]  # the third has the first's query
    for one, query in zip(maps, (5, 9), strict=True):
        layers = inspection.layers
        for grid, parts in enumerate((one.bev, one.camera)):
            if parts.window is None:
                continue
            row, col, row_end, col_end = parts.window
            for shares, kind in ((parts.plain, "plain_window_mass"), (parts.biased, "window_mass")):
                expected = np.mean([getattr(layer, kind)[0, query, grid].item() for layer in layers])
                assert shares[row:row_end, col:col_end].sum() == pytest.approx(expected, rel=1e-4)
        expected = np.mean([layer.mass[0, query, 0].item() for layer in layers])
        assert one.bev.biased.sum() == pytest.approx(expected, rel=1e-4)
        weight = inspection.weights[0, query, 0]
        assert f"LiDAR weight {weight:+.2f}, bias {inspection.bias[0, query, 0]:+.2f}" in one.caption
        assert not np.allclose(one.bev.plain, one.bev.biased)
    assert len(query_maps(model, *inputs, found, 1)) == 1


def test_the_picture_shows_the_cells_where_they_lie(seen):
    model, (images, points, lidar2img), found, _ = seen
    (one,) = query_maps(model, images, points, lidar2img, found, 1)
    peak = np.zeros_like(one.bev.plain)
    row, col = 9, 7  # cells of the map from low y and low x
    peak[row, col] = 1.0
    x, y = one.origin[0] + (col + 0.5) * one.cell_size[0], one.origin[1] + (row + 0.5) * one.cell_size[1]
    one.bev.plain[:], one.bev.biased[:] = peak, 0
    one.box[:2] = x, y - 1.0
    picture = draw_queries([one], images[0], torch.zeros(0, 5), lidar2img[0], "t", [f"CAM_{i}" for i in range(6)])
    bright = heat(np.array(1.0), 1.0)
    found_at = np.argwhere((picture[106:586, :480] == bright).all(axis=-1))
    # 480 pixels are 24 m around the box, whose centre lies 1 m below the cell's; forward is up.
    assert np.abs(found_at.mean(axis=0) - (240 - 20, 240)).max() < 6
    assert not (picture[106:586, 486:966] == bright).all(axis=-1).any()
    assert picture.shape[1] == 2 * 480 + 2 * 860 + 18


def test_colours_of_shares():
    colours = heat(np.array([[0.0, 0.25], [1.0, 4.0]]), 1.0).astype(int)
    assert colours[0, 0].sum() < 20 < colours[0, 1].sum() < colours[1, 0].sum()
    assert (colours[1, 1] == colours[1, 0]).all()
