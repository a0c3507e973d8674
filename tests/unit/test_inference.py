"""The stages at fixed sizes give the detections of the detector, whatever comes in which order."""

import logging
import math

import pytest
import torch

from cmt_aqr import inference
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.inference import InferencePipeline
from cmt_aqr.jobs import decoding_of
from tests.unit.models.test_folding import with_statistics
from tests.unit.models.tiny_detector import ring_of_cameras

SMALL = [
    "model.lidar.sparse_shape=[21,64,64]", "model.num_queries=40", "model.num_layers=2", "model.hidden_dim=32",
    "model.camera.base_channels=8", "model.camera.input_size=[64,160]", "evaluation.max_detections=60",
    "model.aqr.bev_window=5", "model.ffn_dim=32", "evaluation.score_threshold=0.02",
]  # fmt: skip
KINDS = {
    "fusion with AQR": [],
    "fusion": ["model.aqr=null"],
    "v2": ["model.aqr.design=v2", "model.aqr.activation=sigmoid"],
    "LiDAR": ["model.aqr=null", "model.camera=null", "model.init=official"],
    "cameras": ["model.aqr=null", "model.lidar=null", "model.init=official"],
}


def make_detector(changes=(), dtype=torch.float64):
    """In float64, where the order of sums does not matter; statistics are random, so that nothing is hidden."""
    settings = [change for change in SMALL if change.split(".")[1] not in {c.split(".")[1][:-5] for c in changes}]
    config = load_config("configs/synthetic_tiny.yaml", [*settings, *changes])
    torch.manual_seed(0)
    detector = with_statistics(build_detector(config.model))
    with torch.no_grad():
        detector.head.tasks[0].branches["cls_logits"].out.bias.add_(1.0)
    return detector.to(dtype), decoding_of(config)


def make_inputs(counts, seed, turn=0.0, dtype=torch.float64):
    """Images, points in the corner that the small sparse grid covers, and cameras turned about z by so many radians."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(counts), 6, 64, 160, 3), generator=generator, dtype=torch.uint8)
    points = []
    for count in counts:
        cloud = torch.randn(count, 5, generator=generator) * torch.tensor([6.0, 6.0, 1.0, 1.0, 1.0])
        cloud[:, :2] -= 40
        points.append(cloud.to(dtype))
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[0, 0] = rotation[1, 1] = math.cos(turn)
    rotation[0, 1], rotation[1, 0] = -math.sin(turn), math.sin(turn)
    return images, points, ring_of_cameras(len(counts)) @ rotation


def expected_detections(detector, decoding, inputs):
    with torch.inference_mode():
        return postprocess(
            detector(*inputs),
            max_detections=decoding.max_detections,
            post_range=decoding.post_range,
            score_threshold=decoding.score_threshold,
        )


def assert_same(found, expected, tolerance=1e-8):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs.boxes) > 0
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.boxes.dtype == theirs.boxes.dtype and ours.labels.dtype == torch.int64
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=tolerance)


SEQUENCE = {
    "first": make_inputs((900, 700, 800), seed=0),
    "other contents": make_inputs((800, 900, 600), seed=1),
    "another calibration": make_inputs((700, 800, 900), seed=2, turn=0.3),
    "the first calibration again": make_inputs((900, 700, 800), seed=3),
    "an empty cloud": make_inputs((0, 900, 0), seed=4),
    "a smaller batch, turned": make_inputs((900, 300), seed=5, turn=-0.2),
    "one frame": make_inputs((500,), seed=6),
    "all at once": make_inputs((900, 900, 900), seed=7),
}
SEQUENCE["a missing camera"] = make_inputs((900, 700, 800), seed=8)
SEQUENCE["a missing camera"][0][:, 2] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_detector(kind):
    detector, decoding = make_detector(KINDS[kind])
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=3, compiled=False)
    for inputs in SEQUENCE.values():
        assert_same(pipeline(*inputs), expected_detections(detector, decoding, inputs))


@pytest.mark.parametrize("kind", ["fusion with AQR", "LiDAR", "cameras"])
def test_each_stage_is_one_graph_and_nothing_is_compiled_after_the_first_call(kind):
    torch._dynamo.reset()
    detector, decoding = make_detector(KINDS[kind])
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=3, backend="aot_eager")
    first, *others = SEQUENCE.values()
    assert_same(pipeline(*first), expected_detections(detector, decoding, first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs in others:
            assert_same(pipeline(*inputs), expected_detections(detector, decoding, inputs))
    torch._dynamo.reset()


def test_in_float32():
    """1e-4 m of 108; the largest difference is 4e-5 m here."""
    config = load_config("configs/synthetic_tiny.yaml", ["model.lidar.sparse_backend=torch", "model.num_queries=60"])
    torch.manual_seed(0)
    detector = build_detector(config.model).eval()
    decoding = decoding_of(config)
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2, compiled=False)
    _, points, lidar2img = make_inputs((4000, 0), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 6, 96, 256, 3), generator=generator, dtype=torch.uint8)
    found = pipeline(images, points, lidar2img)
    for ours, theirs in zip(found, expected_detections(detector, decoding, (images, points, lidar2img)), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.boxes[:, :3], theirs.boxes[:, :3], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)


def test_the_geometry_is_computed_once_a_calibration(monkeypatch):
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2, compiled=False)
    calls = []
    compute = pipeline.detector.compute_geometry
    monkeypatch.setattr(pipeline.detector, "compute_geometry", lambda *args: calls.append(args) or compute(*args))
    images, points, lidar2img = make_inputs((500, 500), seed=0)
    for _ in range(3):
        pipeline(images, points, lidar2img.clone())
    assert len(calls) == 1
    moved = lidar2img.clone()
    moved[1, 4, 0, 3] *= 1 + 1e-15  # the last bit
    assert not torch.equal(moved, lidar2img)
    pipeline(images, points, moved)
    assert len(calls) == 2
    lidar2img[0] = 7  # the caller's tensor is not what is remembered
    pipeline(images, points, moved)
    assert len(calls) == 2


def test_a_size_that_is_too_small_grows_once_and_no_wrong_box_is_returned(caplog):
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2, compiled=False)
    pipeline(*make_inputs((30, 20), seed=0))
    larger = make_inputs((3000, 3500), seed=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(pipeline(*larger), expected_detections(detector, decoding, larger))
    (record,) = caplog.records
    assert "active cells in its levels, more than" in record.getMessage()


def test_more_points_than_there_is_room_for(caplog, monkeypatch):
    monkeypatch.setattr(inference, "POINT_STEP", 64)
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=2, compiled=False)
    pipeline(*make_inputs((60, 100), seed=0))
    larger = make_inputs((0, 129), seed=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(pipeline(*larger), expected_detections(detector, decoding, larger))
    messages = [record.getMessage() for record in caplog.records]
    assert "inference: a frame has 129 points, more than the 128 rows kept for them; now 192" in messages
    assert len(set(messages)) == len(messages)


def test_images_of_another_size():
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=1, compiled=False)
    small = make_inputs((500,), seed=0)
    large = (torch.randint(0, 256, (1, 6, 128, 320, 3), dtype=torch.uint8), *small[1:])
    for inputs in (small, large, small):
        assert_same(pipeline(*inputs), expected_detections(detector, decoding, inputs))


def test_the_pipeline_keeps_its_own_weights():
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector.train(), decoding=decoding, batch_size=1, compiled=False)
    inputs = make_inputs((500,), seed=0)
    expected = expected_detections(detector.eval(), decoding, inputs)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    assert_same(pipeline(*inputs), expected)


def test_errors():
    detector, decoding = make_detector()
    pipeline = InferencePipeline(detector, decoding=decoding, batch_size=1, compiled=False)
    images, points, lidar2img = make_inputs((5, 5), seed=0)
    with pytest.raises(ValueError, match=r"takes 1 to 1 frames of every sensor, got {'images': 2, 'points': 2}"):
        pipeline(images, points, lidar2img)
    with pytest.raises(ValueError, match=r"got {'images': 1, 'points': 2}"):
        pipeline(images[:1], points, lidar2img[:1])
    with pytest.raises(ValueError, match=r"images must be uint8 of shape .* got torch.float32 \(1, 6, 64, 160, 3\)"):
        pipeline(images[:1].float(), points[:1], lidar2img[:1])
    with pytest.raises(ValueError, match=r"images must be uint8 of shape .* got None"):
        pipeline(None, points[:1], lidar2img[:1])
    with pytest.raises(ValueError, match=r"lidar2img must have shape \(1, 6, 4, 4\) to match the images, got None"):
        pipeline(images[:1], points[:1], None)
    with pytest.raises(ValueError, match="lidar2img holds values that are not finite"):
        pipeline(images[:1], points[:1], lidar2img[:1] * math.nan)
    with pytest.raises(ValueError, match=r"points must be a list of tensors \(P, 5\), got \[\(5, 4\)\]"):
        pipeline(images[:1], [points[0][:, :4]], lidar2img[:1])
    detector.lidar_branch.encoder.out_of_range = "alias"
    with pytest.raises(ValueError, match="fixed sizes need out_of_range='drop'"):
        InferencePipeline(detector, decoding=decoding, batch_size=1)
