"""Queries, decoder, heads, loss and decoding on CUDA: same numbers, no stalls, one graph."""

import contextlib

import pytest
import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.models.denoising import make_denoising
from tests.parity.golden import relative_error
from tests.unit.models.tiny_detector import (
    POINT_RANGE,
    TWO_TASKS,
    gradients,
    make_detector,
    make_features,
    make_noised,
    make_targets,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NOISE = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def ieee_arithmetic():
    convolution, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matmul


@contextlib.contextmanager
def no_stalls():
    """Any operation that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs(device, dtype, counts=(3, 5)):
    """Drawn in float64: another dtype would draw other numbers from the same seed."""
    bev_map, pv_maps, lidar2img, size = make_features(2)
    features = [bev_map.to(device, dtype), pv_maps.to(device, dtype), lidar2img.to(device), size]
    targets = [Targets(t.boxes.to(device, dtype), t.labels.to(device)) for t in make_targets(counts)]
    return features, targets


def train_step(device, dtype, kernel):
    detector = make_detector(kernel=kernel, classes=TWO_TASKS, dtype=dtype).to(device).train()
    features, targets = inputs(device, dtype)
    denoising = make_noised(targets, noise=NOISE)
    predictions = detector.forward_features(*features, denoising)
    terms = Criterion(classes=TWO_TASKS)(predictions, targets, denoising)
    total_loss(terms).backward()
    detections = postprocess(predictions, post_range=(-61.2, -61.2, -10, 61.2, 61.2, 10), max_detections=30)
    return terms, gradients(detector), detections


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-5)))
def test_a_training_step_equals_the_cpu(dtype, tolerance, kernel):
    # float32 on the CPU departs from float64 by 2e-7 here.
    terms, grads, detections = train_step("cuda", dtype, kernel)
    expected_terms, expected_grads, expected_detections = train_step("cpu", torch.float64, kernel)
    for name, value in expected_terms.items():
        assert relative_error(terms[name], value) <= tolerance, name
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, value in expected_grads.items():
        assert (grads[name].cpu().double() - value).abs().max().item() <= tolerance * largest, name
    for found, expected in zip(detections, expected_detections, strict=True):
        assert torch.equal(found.labels.cpu(), expected.labels)
        assert relative_error(found.boxes, expected.boxes) <= tolerance


def test_forward_and_denoising_do_not_wait_for_the_gpu():
    detector = make_detector(kernel=3, dtype=torch.float32).cuda().train()
    features, targets = inputs("cuda", torch.float32)
    noise = NOISE.cuda()
    for _ in range(2):  # the first pass loads kernels
        with no_stalls() if _ else contextlib.nullcontext():
            denoising = make_denoising(targets, num_queries=12, num_dn=10, point_range=POINT_RANGE, noise=noise)
            predictions = detector.forward_features(*features, denoising)
            predictions.codes(0).sum().backward()


def test_one_graph_without_recompiling_under_bfloat16_autocast():
    detector = make_detector(kernel=3, num_layers=1, dtype=torch.float32).cuda().train()
    torch._dynamo.reset()
    compiled = torch.compile(detector.forward_features, fullgraph=True, dynamic=False)
    criterion = Criterion(classes=detector.head.classes)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ((3, 5), (1, 0), (0, 0), (40, 2)):
            features, targets = inputs("cuda", torch.float32, counts)
            denoising = make_noised(targets, noise=NOISE)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                actual = compiled(*features, denoising)
                expected = detector.forward_features(*features, denoising)
            terms = criterion(actual, targets, denoising)
            total_loss(terms).backward()
            for name, value in criterion(expected, targets, denoising).items():
                assert terms[name].dtype == torch.float32
                torch.testing.assert_close(terms[name], value, rtol=0.05, atol=0.02)
    torch._dynamo.reset()
