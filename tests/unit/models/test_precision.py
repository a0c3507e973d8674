"""What stays in float32 under autocast: positions, reference points, windows, heads and losses, stage by stage.

A stage gives the same bits with autocast on and off, so that nothing inside it is rounded, whatever its inputs were.
"""

from dataclasses import replace

import pytest
import torch

from cmt_aqr.cameras import make_cameras
from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.position import bev_positions, pv_positions
from cmt_aqr.models.queries import query_positions
from tests.unit.models.tiny_detector import (
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

HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("half", HALVES, ids=("bf16", "fp16"))


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


def assert_same(actual, expected, dtype=torch.float32):
    """Equal to the bit and of this dtype."""
    assert actual.dtype == expected.dtype == dtype
    assert torch.equal(actual, expected)


def heads_inputs(*, layers=6, queries=300, dim=256):
    """Decoder output as a layer norm leaves it, and reference points."""
    torch.manual_seed(0)
    hidden = torch.nn.functional.layer_norm(torch.randn(layers, 1, queries, dim), (dim,))
    return hidden, torch.rand(1, queries, 3)


@torch.no_grad()
@pytest.mark.parametrize("rounds_input", (False, True))
@pytest.mark.parametrize("kernel", (1, 3))
def test_heads(half, kernel, rounds_input):
    hidden, points = heads_inputs(layers=2, queries=20, dim=32)
    heads = Heads(classes=TWO_TASKS, num_layers=2, dim=32, point_range=POINT_RANGE, kernel=kernel)
    hidden = hidden.to(half) if rounds_input else hidden
    is_valid = torch.arange(20) >= 4
    with autocast(half):
        actual = heads(hidden, points, is_valid=is_valid)
    expected = heads(hidden.float(), points, is_valid=is_valid)
    for left, right in zip(actual.tasks, expected.tasks, strict=True):
        for name, tensor in left.items():
            assert_same(tensor, right[name])


@torch.no_grad()
def test_the_heads_move_no_box_centre(half):
    """Heads of the official size, on the same decoder output; rounded heads are 2 cm off on average (bfloat16)."""
    hidden, points = heads_inputs()
    heads = Heads(classes=ONE_TASK, num_layers=6, dim=256, point_range=POINT_RANGE)
    exact = heads(hidden, points).tasks[0]["center"]
    with autocast(half):
        centres = heads(hidden, points).tasks[0]["center"]
    assert (centres - exact).norm(dim=-1).mean() <= 1e-3


@torch.no_grad()
def test_positions(half):
    detector = make_detector(dtype=torch.float32)
    points, lidar2img = torch.rand(2, 9, 3), ring_of_cameras(2)

    def stages():
        cameras = make_cameras(lidar2img, IMAGE_SIZE, dtype=torch.float32)
        return (
            bev_positions(detector.bev_embedding, 6, 7, like=detector.reference_points.weight),
            pv_positions(detector.ray_embedding, 2, 5, cameras),
            query_positions(detector.bev_embedding, detector.ray_embedding, points, cameras),
            query_positions(detector.bev_embedding, None, points, None),
        )

    with autocast(half):
        actual = stages()
    for left, right in zip(actual, stages(), strict=True):
        assert_same(left, right)


def test_gradients_of_positions_and_heads(half):
    detector = make_detector(dtype=torch.float32)
    cameras = make_cameras(ring_of_cameras(2), IMAGE_SIZE, dtype=torch.float32)
    hidden = torch.randn(2, 2, 12, 16)
    grads = []
    for enabled in (True, False):
        detector.zero_grad()
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            queries = detector.make_queries(2, cameras, None)
            codes = detector.head(hidden, queries.reference_points).codes(0)
            loss = codes.square().sum() + queries.positions.square().sum()
        loss.backward()
        grads.append(gradients(detector))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=0, msg=name)
    for name in ("reference_points.weight", "ray_embedding.mlp.0.weight", "head.tasks.0.branches.dim.conv.weight"):
        assert grads[0][name].abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("design", ("bias", "v1"))
def test_reference_points_tokens_and_windows(half, design):
    """Positions of tokens and queries, denoising rows included, inside the detector; windows are whole numbers."""
    detector = make_detector(dtype=torch.float32, design=design).eval()
    features = make_features(2, dtype=torch.float32)
    targets = make_targets((3, 5), dtype=torch.float32)

    def stages():
        denoising = make_noised(targets)
        cameras = detector.make_cameras(*features[1:])
        tokens = detector.make_tokens(*features[:2], cameras)
        queries = detector.make_queries(2, cameras, denoising)
        windows = detector.route(queries, tokens, cameras).windows
        return (tokens.positions, queries.positions, queries.reference_points, denoising.boxes), windows

    with autocast(half):
        actual, windows = stages()
    expected, expected_windows = stages()
    for left, right in zip(actual, expected, strict=True):
        assert_same(left, right)
    for ours, theirs in zip(windows.cells, expected_windows.cells, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rounds_input", (False, True))
def test_losses(half, rounds_input):
    """Predictions that were rounded elsewhere make no rounded loss."""
    detector = make_detector(dtype=torch.float32)
    targets = make_targets((3, 5), dtype=torch.float32)
    denoising = make_noised(targets, noise=torch.full((2, 10, 3), 0.6))
    predictions = detector.forward_features(*make_features(2, dtype=torch.float32), denoising)
    rounded = predictions
    if rounds_input:
        rounded = replace(
            predictions, tasks=tuple({name: x.to(half) for name, x in task.items()} for task in predictions.tasks)
        )
        predictions = replace(
            predictions, tasks=tuple({name: x.float() for name, x in task.items()} for task in rounded.tasks)
        )
    criterion = Criterion(classes=ONE_TASK)
    with autocast(half):
        actual = criterion(rounded, targets, denoising)
    for name, value in criterion(predictions, targets, denoising).items():
        assert_same(actual[name], value)


@torch.no_grad()
def test_a_float64_model_stays_in_float64(half):
    """Autocast leaves float64 alone, and so do the float32 stages."""
    detector = make_detector(design="bias").eval()
    features = make_features(2)
    exact = detector.forward_features(*features)
    with autocast(half):
        actual = detector.forward_features(*features)
    for name, tensor in actual.tasks[0].items():
        assert_same(tensor, exact.tasks[0][name], torch.float64)
