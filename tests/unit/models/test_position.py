"""Sine embedding, cell centres, camera rays."""

import math

import pytest
import torch

from cmt_aqr.cameras import make_cameras
from cmt_aqr.geometry import project, to_metres
from cmt_aqr.models.position import (
    RayEmbedding,
    bev_cell_centres,
    camera_rays,
    pixel_corners,
    pv_positions,
    ray_depths,
    sine_embedding,
)
from tests.unit.models.tiny_detector import IMAGE_SIZE, POINT_RANGE, ring_of_cameras

F64 = {"dtype": torch.float64, "device": torch.device("cpu")}


def test_sine_embedding_divides_by_a_linear_term_and_puts_y_first():
    x, y, features = 0.3, 0.85, 6
    expected = []
    for p in (y, x):
        for i in range(features):
            angle = 2 * math.pi * p / (1 + 2 * (i // 2) / features)
            expected.append(math.cos(angle) if i % 2 else math.sin(angle))
    actual = sine_embedding(torch.tensor([[x, y]], dtype=torch.float64), features)
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-15)


def test_sine_embedding_refuses_an_odd_width():
    with pytest.raises(ValueError, match="even number of features per coordinate, got 5"):
        sine_embedding(torch.zeros(1, 2), 5)


def test_bev_cells_are_centres_in_token_order():
    centres = bev_cell_centres(2, 4, **F64)
    expected = [[(col + 0.5) / 4, (row + 0.5) / 2] for row in range(2) for col in range(4)]
    assert centres.tolist() == expected


@pytest.mark.parametrize("cells", (128, 180))
def test_bev_cells_fill_the_unit_square_whatever_their_metric_size(cells):
    # Quirk Q13: 128 cells of 0.8 m are 102.4 m, yet the last centre lies half a 128th below the border of 108 m.
    centres = bev_cell_centres(cells, cells, **F64)
    assert centres.min().item() == 0.5 / cells
    assert centres.max().item() == (cells - 0.5) / cells


def test_pixels_are_the_corners_of_the_cells():
    pixels = pixel_corners(2, 3, (320, 800), like=torch.zeros(1, **F64))
    torch.testing.assert_close(pixels[4], torch.tensor([800 / 3, 160.0, 1.0], **F64))
    assert pixels[0].tolist() == [0, 0, 1]


def test_depth_bins_are_linear_from_one_metre():
    depths = ray_depths(64, 54.0, **F64)
    assert depths[0] == 1
    assert depths[-1].item() == pytest.approx(53.171875)
    assert depths.diff().unique().numel() <= 2 or depths.diff().std() < 1e-12


def test_points_of_a_ray_project_back_to_their_pixel_and_depth():
    cameras = make_cameras(ring_of_cameras(2), IMAGE_SIZE, dtype=torch.float64)
    pixels = pixel_corners(3, 5, IMAGE_SIZE, like=cameras.img2lidar)
    depths = ray_depths(7, 54.0, **F64)
    rays = camera_rays(pixels, cameras.img2lidar, depths, POINT_RANGE)
    points = to_metres(rays.unflatten(-1, (7, 3)), POINT_RANGE)  # (B, V, P, N, 3)
    for view in range(points.shape[1]):
        scaled, depth = project(points[:, view].flatten(1, 2), cameras.lidar2img[:, view : view + 1])
        torch.testing.assert_close(depth[0, 0], depths.repeat(15), rtol=1e-10, atol=1e-10)
        uv = scaled[:, 0] / depth[:, 0, :, None]
        torch.testing.assert_close(uv[0], pixels[:, :2].repeat_interleave(7, 0), rtol=1e-8, atol=1e-8)


def test_autocast_does_not_round_coordinates():
    cameras = make_cameras(ring_of_cameras(1), IMAGE_SIZE, dtype=torch.float32)
    pixels = pixel_corners(3, 5, IMAGE_SIZE, like=cameras.img2lidar)
    embedding = RayEmbedding(dim=8, num_depths=7, point_range=POINT_RANGE)
    exact = embedding(pixels, cameras.img2lidar)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding(pixels, cameras.img2lidar), exact)


def test_camera_positions_come_in_token_order():
    embedding = RayEmbedding(dim=8, num_depths=4, point_range=POINT_RANGE).double()
    cameras = make_cameras(ring_of_cameras(2), IMAGE_SIZE, dtype=torch.float64)
    positions = pv_positions(embedding, 3, 5, cameras)
    pixels = pixel_corners(3, 5, IMAGE_SIZE, like=cameras.img2lidar)
    view, row, col = 4, 2, 3
    alone = embedding(pixels[row * 5 + col][None], cameras.img2lidar[1:, view : view + 1])
    torch.testing.assert_close(positions[1, (view * 3 + row) * 5 + col], alone[0, 0, 0])


def test_calibration_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"lidar2img must have shape \(B, V, 4, 4\), got \(2, 4, 4\)"):
        make_cameras(torch.eye(4).expand(2, 4, 4), IMAGE_SIZE, dtype=torch.float32)
