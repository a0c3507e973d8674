"""Geometry and boxes against hand-computed values."""

import math

import pytest
import torch

from cmt_aqr.boxes import box_corners, decode_boxes, encode_boxes, points_in_boxes
from cmt_aqr.geometry import inverse_sigmoid, project, to_metres, to_unit, transform_points

RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def test_unit_cube_and_metres_are_inverse():
    points = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.75, 0.125]], dtype=torch.float64)
    metres = to_metres(points, RANGE)
    assert metres.tolist() == [[-54.0, 0.0, 3.0], [-27.0, 27.0, -4.0]]
    assert torch.equal(to_unit(metres, RANGE), points)


def test_inverse_sigmoid_inverts_inside_and_clamps_outside():
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, atol=1e-15)
    assert inverse_sigmoid(torch.tensor(0.0)).item() == pytest.approx(math.log(1e-5), rel=1e-6)
    assert inverse_sigmoid(torch.tensor(2.0)).item() == pytest.approx(-math.log(1e-5), rel=1e-6)


def test_projection_of_a_point_ahead():
    # Camera at the LiDAR's origin looking along +y: u grows with x, v falls with z, depth is y.
    lidar2img = torch.tensor([[100.0, 50, 0, 0], [0, 40, -100, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    scaled, depth = project(torch.tensor([[[1.0, 10.0, 2.0]]], dtype=torch.float64), lidar2img[None, None])
    assert depth.item() == 10.0
    assert (scaled / depth[..., None]).flatten().tolist() == [60.0, 20.0]


def test_transform_is_rotation_then_translation():
    matrix = torch.tensor([[0.0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    assert transform_points(matrix, torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[3.0, 7.0, 10.0]]


def test_box_code_order_and_round_trip():
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0, 1.5, 0.3, 0.7, -0.2]], dtype=torch.float64)
    expected = [1, 2, math.log(4), math.log(2), 3, math.log(1.5), math.sin(0.3), math.cos(0.3), 0.7, -0.2]
    assert encode_boxes(box)[0].tolist() == pytest.approx(expected, abs=1e-15)
    assert torch.allclose(decode_boxes(encode_boxes(box)), box, atol=1e-15)


def test_corners_of_a_turned_box():
    corners = box_corners(torch.tensor([[10.0, 20, 1, 4, 2, 2, math.pi / 2, 0, 0]], dtype=torch.float64))[0]
    front = corners[[1, 2, 5, 6]]
    assert torch.allclose(front[:, 1], torch.full((4,), 22.0, dtype=torch.float64))  # heading +y
    assert corners[:, 0].min().item() == pytest.approx(9) and corners[:, 0].max().item() == pytest.approx(11)
    assert corners[:4, 2].tolist() == [0.0] * 4 and corners[4:, 2].tolist() == [2.0] * 4


def test_points_in_a_turned_box():
    box = torch.tensor([[0.0, 0, 0, 4, 1, 2, math.pi / 4, 0, 0]], dtype=torch.float64)
    points = torch.tensor([[1.3, 1.3, 0], [1.5, 1.5, 0], [1.0, -1.0, 0], [0, 0, 1.0], [0, 0, 1.01]]).double()
    assert points_in_boxes(points, box)[:, 0].tolist() == [True, False, False, True, False]
