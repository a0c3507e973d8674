"""The whole detector behind the branches: batching, padding, padding rows, autocast, compilation, bad input."""

import pytest
import torch
from torch import nn

from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.models.denoising import make_denoising
from tests.unit.models.tiny_detector import (
    BEV_CHANNELS,
    DIM,
    IMAGE_SIZE,
    ONE_TASK,
    POINT_RANGE,
    TWO_TASKS,
    gradients,
    make_detector,
    make_features,
    make_noised,
    make_targets,
    ring_of_cameras,
)

SENSORS = {"fusion": {}, "lidar": {"cameras": False}, "camera": {"lidar": False}}


@pytest.fixture(params=SENSORS, scope="module")
def sensors(request):
    return SENSORS[request.param]


def all_outputs(predictions):
    return {f"{i}/{name}": tensor for i, task in enumerate(predictions.tasks) for name, tensor in task.items()}


@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one(sensors):
    detector = make_detector(**sensors).eval()
    features = make_features(3, **sensors)
    together = all_outputs(detector.forward_features(*features))
    for sample in range(3):
        one = [x[sample : sample + 1] if torch.is_tensor(x) else x for x in features]
        for name, alone in all_outputs(detector.forward_features(*one)).items():
            torch.testing.assert_close(together[name][:, sample], alone[:, 0], rtol=1e-10, atol=1e-10)


def step(detector, features, targets, *, num_dn, noise):
    """Losses and all gradients of one training step; `noise` (B, rows, 3) belongs to the last rows."""
    detector.zero_grad()
    padded = torch.zeros(len(targets), num_dn, 3, dtype=torch.float64)
    rows = min(num_dn, noise.shape[1])
    padded[:, num_dn - rows :] = noise[:, noise.shape[1] - rows :]
    num_queries = detector.reference_points.num_queries
    denoising = make_noised(targets, num_dn=num_dn, noise=padded, num_queries=num_queries)
    detector.shared_conv is None or detector.shared_conv[1].reset_running_stats()
    predictions = detector.train().forward_features(*features, denoising)
    terms = Criterion(classes=detector.head.classes)(predictions, targets, denoising)
    total_loss(terms).backward()
    return predictions, terms, gradients(detector)


@pytest.mark.parametrize("kernel", (1, 3))
def test_padding_rows_change_no_output_no_loss_and_no_gradient(sensors, kernel):
    detector = make_detector(**sensors, kernel=kernel, classes=TWO_TASKS)
    features, targets = make_features(2, **sensors), make_targets((3, 5))
    noise = torch.rand(2, 10, 3, dtype=torch.float64)
    tight = step(detector, features, targets, num_dn=10, noise=noise)  # 2 groups of 5 slots
    wide = step(detector, features, targets, num_dn=47, noise=noise)
    for name, expected in all_outputs(tight[0]).items():
        torch.testing.assert_close(all_outputs(wide[0])[name][:, :, 37:], expected, rtol=1e-11, atol=1e-11)
    for left, right in zip(tight[1:], wide[1:], strict=True):
        assert left.keys() == right.keys()
        for name, expected in left.items():
            torch.testing.assert_close(right[name], expected, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("kernel", (1, 3))
def test_a_batch_without_boxes_has_no_denoising_loss_and_trains_like_without_denoising(kernel):
    detector = make_detector(kernel=kernel)
    features, targets = make_features(2), make_targets((0, 0))
    _, with_rows, grads = step(detector, features, targets, num_dn=9, noise=torch.rand(2, 9, 3).double())
    denoising_terms = {name: value for name, value in with_rows.items() if "dn_" in name}
    assert len(denoising_terms) == 4
    assert all(value.item() == 0 for value in denoising_terms.values())
    assert all(value.isfinite().all() for value in grads.values())

    detector.zero_grad()
    plain = Criterion(classes=ONE_TASK)(detector.forward_features(*features), targets)
    total_loss(plain).backward()
    for name, value in plain.items():
        torch.testing.assert_close(with_rows[name], value, rtol=1e-11, atol=1e-11)
    for name, value in gradients(detector).items():
        torch.testing.assert_close(grads[name], value, rtol=1e-10, atol=1e-11)


def test_denoising_loss_of_empty_targets_has_zero_gradient():
    detector = make_detector()
    features, targets = make_features(2), make_targets((0, 0))
    denoising = make_denoising(targets, num_queries=12, num_dn=9, point_range=POINT_RANGE)
    terms = Criterion(classes=ONE_TASK)(detector.forward_features(*features, denoising), targets, denoising)
    sum(value for name, value in terms.items() if "dn_" in name).backward()
    assert not any(grad.any() for grad in gradients(detector).values())


def test_more_boxes_than_queries_trains():
    detector = make_detector()
    targets = make_targets((20, 3))
    for num_dn in (0, 6, 60):
        noise = torch.rand(2, num_dn, 3).double()
        _, terms, grads = step(detector, make_features(2), targets, num_dn=num_dn, noise=noise)
        assert total_loss(terms).isfinite()
        assert all(grad.isfinite().all() for grad in grads.values())


class Pool(nn.Module):
    """Stand-in for the image branch: (N, H, W, 3) uint8 -> (N, C, 2, 5)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, DIM)

    def forward(self, images, *, mask=None):
        images = images if mask is None else images * mask[..., None]
        return nn.functional.avg_pool2d(self.mix(images / 255).permute(0, 3, 1, 2), 32, ceil_mode=True)


class Scatter(nn.Module):
    """Stand-in for the LiDAR branch: list of (P, 5) -> (B, C_in, 6, 6)."""

    def forward(self, points):
        return torch.stack([p.mean(0).sum() * torch.ones(BEV_CHANNELS, 6, 6) for p in points])


def test_forward_is_the_branches_and_then_the_features():
    detector = make_detector(dtype=torch.float32).eval()
    detector.image_branch, detector.lidar_branch = Pool(), Scatter()
    images = torch.randint(256, (2, 6, *IMAGE_SIZE, 3), dtype=torch.uint8)
    points = [torch.randn(20, 5), torch.randn(30, 5)]
    before = set(vars(detector))
    predictions = detector(images, points, ring_of_cameras(2))
    assert set(vars(detector)) == before
    mask = torch.rand(IMAGE_SIZE) < 0.5
    masked = detector(images, points, ring_of_cameras(2), image_mask=mask)
    blanked = detector(images * mask[..., None], points, ring_of_cameras(2))
    assert torch.equal(masked.codes(0), blanked.codes(0))
    assert not torch.equal(masked.codes(0), predictions.codes(0))
    maps = detector.encode_images(images)
    assert maps.shape == (2, 6, DIM, 2, 5)
    again = detector.forward_features(detector.encode_points(points), maps, ring_of_cameras(2), IMAGE_SIZE)
    for name, tensor in all_outputs(predictions).items():
        assert torch.equal(tensor, all_outputs(again)[name])
    with pytest.raises(ValueError, match=r"images .* must have shape \(B, V, H, W, 3\), got \(6, 64, 160, 3\)"):
        detector(images[0], points, ring_of_cameras(2))
    with pytest.raises(ValueError, match="images of 64 x 150 pixels do not fit camera maps of 2 x 5 cells"):
        detector(images[:, :, :, :150], points, ring_of_cameras(2))
    with pytest.raises(ValueError, match="points of a detector with LiDAR must be a list"):
        detector(images, None, ring_of_cameras(2))
    with pytest.raises(ValueError, match=r"lidar2img must have shape \(2, 6, 4, 4\) .* got None"):
        detector(images, points, None)


def test_autocast_keeps_reference_points_and_predictions_in_float32():
    detector = make_detector(dtype=torch.float32)
    features = make_features(2, dtype=torch.float32)
    exact = all_outputs(detector.eval().forward_features(*features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cameras = detector.make_cameras(features[1], features[2], features[3])
        assert detector.make_queries(2, cameras, None).reference_points.dtype == torch.float32
        rounded = all_outputs(detector.forward_features(*features))
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.float32
        if not name.endswith("center"):
            torch.testing.assert_close(tensor, exact[name], rtol=0.1, atol=0.2)


def test_one_graph_no_breaks_no_recompiles_and_the_same_numbers():
    detector = make_detector(num_layers=1, classes=TWO_TASKS, kernel=3)
    torch._dynamo.reset()
    compiled = torch.compile(detector.forward_features, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, counts in enumerate(((3, 5), (1, 0), (0, 0), (11, 2), (40, 1))):
            features, targets = make_features(2, seed=seed), make_targets(counts, seed=seed)
            denoising = make_denoising(targets, num_queries=12, num_dn=10, point_range=POINT_RANGE)
            actual = compiled(*features, denoising)
            expected = detector.forward_features(*features, denoising)
            assert actual.num_dn == expected.num_dn == 10
            for name, tensor in all_outputs(expected).items():
                torch.testing.assert_close(all_outputs(actual)[name], tensor, rtol=1e-12, atol=1e-12)
            loss = Criterion(classes=TWO_TASKS)(actual, targets, denoising)
            total_loss(loss).backward()
    torch._dynamo.reset()


def test_a_missing_or_superfluous_sensor_is_refused():
    bev_map, pv_maps, lidar2img, size = make_features(2)
    with pytest.raises(ValueError, match="built with LiDAR and with cameras, got no BEV map and some camera maps"):
        make_detector().forward_features(None, pv_maps, lidar2img, size)
    with pytest.raises(ValueError, match="built with LiDAR and without cameras, got a BEV map and some camera maps"):
        make_detector(cameras=False).forward_features(bev_map, pv_maps, lidar2img, size)
    with pytest.raises(ValueError, match="got neither"):
        make_detector(lidar=False, cameras=False)


def test_denoising_for_another_number_of_queries_is_refused():
    denoising = make_denoising(make_targets((1, 1)), num_queries=5, num_dn=4, point_range=POINT_RANGE)
    with pytest.raises(ValueError, match=r"must have shape \(16, 16\) \(num_dn \+ num_queries\), got \(9, 9\)"):
        make_detector().forward_features(*make_features(2), denoising)
