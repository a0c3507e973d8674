"""Reference points, projection of queries, position embeddings of queries."""

import pytest
import torch

from cmt_aqr.cameras import make_cameras
from cmt_aqr.geometry import to_metres, to_unit
from cmt_aqr.models.denoising import make_denoising
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.models.queries import ReferencePoints, project_to_pixels, query_positions, ray_query_positions
from tests.unit.models.tiny_detector import IMAGE_SIZE, POINT_RANGE, make_targets, ring_of_cameras


@pytest.fixture
def cameras():
    return make_cameras(ring_of_cameras(2), IMAGE_SIZE, dtype=torch.float64)


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 40, 3, generator=generator, dtype=torch.float64)


def test_reference_points_start_uniform_in_the_unit_cube():
    weight = ReferencePoints(num_queries=4000).weight
    assert weight.min() >= 0
    assert weight.max() < 1
    assert weight.mean(0).sub(0.5).abs().max() < 0.03


def test_denoising_rows_come_first():
    reference_points = ReferencePoints(num_queries=5)
    denoising = make_denoising(make_targets((2, 1)), num_queries=5, num_dn=4, point_range=POINT_RANGE)
    joined = reference_points(2, denoising)
    assert joined.shape == (2, 9, 3)
    assert torch.equal(joined[:, :4], denoising.reference_points.float())
    assert torch.equal(joined[0, 4:], reference_points.weight)


def test_denoising_of_another_batch_is_refused():
    denoising = make_denoising(make_targets((2, 1)), num_queries=5, num_dn=4, point_range=POINT_RANGE)
    with pytest.raises(ValueError, match="denoising queries are for 2 samples, the batch has 3"):
        ReferencePoints(num_queries=5)(3, denoising)


def test_projection_and_visibility_point_by_point(cameras, points):
    pixels, is_seen = project_to_pixels(points, cameras, POINT_RANGE)
    metres = to_metres(points, POINT_RANGE)
    height, width = IMAGE_SIZE
    for b in range(2):
        for view in range(6):
            for q in range(points.shape[1]):
                x, y, z, _ = (cameras.lidar2img[b, view] @ torch.cat((metres[b, q], torch.ones(1)))).tolist()
                u, v = x / z, y / z
                assert bool(is_seen[b, view, q]) == (z > 0 and 0 <= u < width and 0 <= v < height)
                if z > 1:
                    assert pixels[b, view, q, :2].tolist() == pytest.approx([u, v], rel=1e-5)


def test_the_divisor_has_no_gradient_but_the_third_component_has(cameras, points):
    # Quirk Q6: d(pixel)/d(point) = row of lidar2img / depth, without the quotient rule.
    points.requires_grad_()
    pixels, _ = project_to_pixels(points, cameras, (0.0, 0.0, 0.0, 1.0, 1.0, 1.0))
    view, q = 1, 7
    depth = cameras.lidar2img[0, view, 2, :3] @ points[0, q].detach() + cameras.lidar2img[0, view, 2, 3]
    for component in range(3):
        (grad,) = torch.autograd.grad(pixels[0, view, q, component], points, retain_graph=True)
        expected = cameras.lidar2img[0, view, component, :3] / depth
        torch.testing.assert_close(grad[0, q], expected, rtol=1e-4, atol=1e-9)


def test_embeddings_are_summed_over_the_views_that_see_the_point(cameras):
    torch.manual_seed(0)
    embedding = RayEmbedding(dim=8, num_depths=4, point_range=POINT_RANGE).double()
    metres = torch.tensor([[0.0, 20.0, 1.0], [12.0, 20.0, 1.0], [0.0, 0.5, 3.0]], dtype=torch.float64)
    unit = to_unit(metres, POINT_RANGE).expand(2, 3, 3)
    pixels, is_seen = project_to_pixels(unit, cameras, POINT_RANGE)
    assert is_seen[0].sum(0).tolist() == [1, 2, 0]  # straight ahead; where two cameras overlap; above the roof
    each = embedding(pixels, cameras.img2lidar)
    summed = ray_query_positions(embedding, unit, cameras)
    torch.testing.assert_close(summed[0, 0], each[0, 0, 0])
    torch.testing.assert_close(summed[0, 1], each[0, is_seen[0, :, 1], 1].sum(0))
    assert torch.equal(summed[0, 2], torch.zeros(8, dtype=torch.float64))


def test_positions_are_finite_with_a_gradient_on_the_borders(cameras):
    torch.manual_seed(0)
    bev = BevEmbedding(dim=8).double()
    ray = RayEmbedding(dim=8, num_depths=4, point_range=POINT_RANGE).double()
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]], dtype=torch.float64).repeat(2, 1, 1)
    corners.requires_grad_()
    positions = query_positions(bev, ray, corners, cameras)
    positions.sum().backward()
    assert positions.isfinite().all()
    assert corners.grad.isfinite().all()


def test_without_cameras_only_the_ground_counts(points):
    bev = BevEmbedding(dim=8).double()
    positions = query_positions(bev, None, points, None)
    torch.testing.assert_close(positions, bev(points[..., :2]), rtol=1e-3, atol=1e-3)
    moved = points + torch.tensor([0.0, 0.0, 0.3])
    torch.testing.assert_close(query_positions(bev, None, moved, None), positions)
