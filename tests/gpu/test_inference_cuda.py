"""The inference pipeline on CUDA: compiled stages, CUDA graphs, three streams, and the detections of the detector."""

from itertools import pairwise

import pytest
import torch

from cmt_aqr.boxes import Detections
from cmt_aqr.inference import InferencePipeline
from tests.unit.test_inference import KINDS, SEQUENCE, expected_detections, make_detector, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Heads of 32 channels, as in the official sizes.
CHANGES = ["model.hidden_dim=64", "model.num_heads=2"]
# float32 against float32: on a CPU against float64 2e-4 m and 1e-4.
CENTRE_M, SCORE = 2e-3, 5e-4


@pytest.fixture(autouse=True)
def fresh_ieee_arithmetic():
    convolution, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matmul


def on_gpu(kind):
    """Scores spread out and, with AQR, weights of about 0.5: fresh ones are nearly the same everywhere.

    Logits of a single sensor vary more, and scores that are all 1 could not be told apart.
    """
    detector, decoding = make_detector([*KINDS[kind], *CHANGES], dtype=torch.float32)
    with torch.no_grad():
        for task in detector.head.tasks:
            task.branches["cls_logits"].out.weight.mul_(4 if kind in ("LiDAR", "cameras") else 30)
        if detector.aqr is not None:
            torch.nn.init.normal_(detector.aqr.generator.linear.weight, std=0.5)
    return detector.cuda().eval(), decoding


def in_float32(inputs):
    images, points, lidar2img = inputs
    return images, [cloud.float() for cloud in points], lidar2img


def pinned(inputs):
    images, points, lidar2img = in_float32(inputs)
    return images.pin_memory(), [cloud.pin_memory() for cloud in points], lidar2img


def expected(detector, decoding, inputs):
    images, points, lidar2img = in_float32(inputs)
    moved = images.cuda(), [cloud.cuda() for cloud in points], lidar2img.cuda()
    return [found.cpu() for found in expected_detections(detector, decoding, moved)]


def assert_matched(found: list[Detections], wanted: list[Detections]) -> None:
    """Every box has its like of the same class within the limits; those nearly too weak to be kept may differ."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(theirs.boxes) > 0 and abs(len(ours.boxes) - len(theirs.boxes)) <= 2
        is_clear = theirs.scores > theirs.scores.min() + 2 * SCORE
        assert is_clear.any()
        for box, score, label in zip(
            theirs.boxes[is_clear], theirs.scores[is_clear], theirs.labels[is_clear], strict=True
        ):
            is_like = (ours.labels == label) & ((ours.scores - score).abs() <= SCORE)
            distance = (ours.boxes[is_like, :3] - box[:3]).norm(dim=-1)
            assert len(distance) and distance.min() <= CENTRE_M


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_detector_and_nothing_is_compiled_twice(kind):
    detector, decoding = on_gpu(kind)
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=3)
    # The detector itself compiles its attention for every batch size.
    wanted = [expected(detector, decoding, inputs) for inputs in SEQUENCE.values()]
    first, *others = SEQUENCE.values()
    assert_matched(pipeline(*in_float32(first)), wanted[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs, boxes in zip(others, wanted[1:], strict=True):
            assert_matched(pipeline(*in_float32(inputs)), boxes)


def test_launching_waits_for_nothing():
    detector, decoding = on_gpu("fusion with AQR")
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=3)
    sequence = [pinned(inputs) for inputs in SEQUENCE.values()]
    for inputs in sequence:  # sizes become known
        pipeline(*inputs)
    for inputs in sequence:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pipeline.launch(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_matched([found.detections for found in pipeline.read()], expected(detector, decoding, inputs))


def test_frames_in_quick_succession_do_not_mix():
    """A call writes its inputs while the work of the one before may be under way on other streams."""
    detector, decoding = on_gpu("fusion with AQR")
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=1)
    frames = [pinned(make_inputs((800,), seed=seed, turn=0.1 * (seed % 3))) for seed in range(12)]
    for frame in frames:
        pipeline(*frame)
    for first, second in pairwise(frames):
        pipeline.launch(*first)
        pipeline.launch(*second)
        assert_matched([found.detections for found in pipeline.read()], expected(detector, decoding, second))


def test_sizes_that_are_too_small_grow():
    detector, decoding = on_gpu("fusion with AQR")
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2)
    pipeline(*in_float32(make_inputs((30, 20), seed=0)))
    for counts in ((3000, 3500), (9000, 100)):
        larger = make_inputs(counts, seed=1)
        for _ in range(2):
            assert_matched(pipeline(*in_float32(larger)), expected(detector, decoding, larger))


def test_the_same_frame_gives_the_same_bits():
    detector, decoding = on_gpu("fusion with AQR")
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2, precision=torch.float16)
    frame = pinned(make_inputs((2000, 1500), seed=0))
    first = pipeline(*frame)
    for _ in range(5):
        for ours, theirs in zip(pipeline(*frame), first, strict=True):
            assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)
            assert ours.scores.isfinite().all() and len(ours.boxes) > 0
