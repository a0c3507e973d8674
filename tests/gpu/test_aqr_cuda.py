"""The detector with AQR on CUDA: one graph for the whole decoder, the numbers of the dense evaluator, gradients."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from cmt_aqr.tools.attention_cases import nuscenes_lidar2img
from tests.unit.models.tiny_detector import gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CONFIG = load_config(Path(__file__).parents[2] / "configs" / "ablation" / "v3.yaml").model
IMAGE_SIZE = (256, 704)
STEP = 1e-2  # length of a step in weights, for the slope of the loss


def make_inputs(seed, counts):
    """Maps, calibration and targets of two samples; every seed has other contents, calibration and boxes."""
    generator = torch.Generator().manual_seed(seed)
    bev_map = torch.randn(2, 256, 64, 64, generator=generator).cuda()
    pv_maps = torch.randn(2, 6, CONFIG.hidden_dim, 16, 44, generator=generator).cuda()
    angle = 0.1 * seed
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    lidar2img = (nuscenes_lidar2img(IMAGE_SIZE) @ turn).expand(2, -1, -1, -1).cuda()
    targets = []
    for count in counts:
        boxes = torch.rand(count, 9, generator=generator) * 60 - 30
        boxes[:, 3:6] = boxes[:, 3:6].abs() / 10 + 0.5
        targets.append(Targets(boxes.cuda(), torch.randint(0, 10, (count,), generator=generator).cuda()))
    noise = torch.rand(2, CONFIG.denoising.num_dn, 3, generator=generator).cuda()
    denoising = make_denoising(
        targets,
        num_queries=CONFIG.num_queries,
        num_dn=CONFIG.denoising.num_dn,
        point_range=CONFIG.point_range,
        settings=DenoisingSettings(max_groups=4),
        noise=noise,
    )
    return (bev_map, pv_maps, lidar2img, IMAGE_SIZE, denoising), targets


def make_detector(backend="auto"):
    torch.manual_seed(0)
    detector = build_detector(CONFIG).cuda().train()
    torch.nn.init.normal_(detector.aqr.generator.linear.weight, std=0.5)
    detector.aqr.backend = backend
    return detector


def train_step(detector, forward, inputs, targets):
    detector.zero_grad()
    predictions = forward(*inputs)
    criterion = Criterion(classes=detector.head.classes)
    total_loss(criterion(predictions, targets, inputs[-1])).backward()
    return predictions, {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def test_one_graph_without_recompiling_and_gradients_of_the_weights():
    torch._dynamo.reset()
    detector = make_detector()
    compiled = torch.compile(detector.forward_features, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, counts in enumerate(((3, 5), (20, 0), (0, 0))):
            inputs, targets = make_inputs(seed, counts)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                _, grads = train_step(detector, compiled, inputs, targets)
            assert grads["aqr.scale.value"].abs().item() > 0
            assert all(g.abs().max() > 0 for name, g in grads.items() if name.startswith("aqr.generator.linear"))
    torch._dynamo.reset()


def recomputing(is_recomputed, dropout):
    torch.manual_seed(0)
    model = replace(CONFIG, dropout=dropout, activation_checkpointing=is_recomputed)
    detector = build_detector(model).cuda().train()
    torch.nn.init.normal_(detector.aqr.generator.linear.weight, std=0.5)
    return detector


@pytest.mark.parametrize(("compiles", "dropout"), ((True, 0.0), (False, 0.3)), ids=("compiled", "eager, dropout"))
def test_recomputed_layers_give_the_same_gradients_in_less_memory(compiles, dropout):
    """With dropout only in eager mode: two compiled graphs draw other numbers from one seed."""
    inputs, targets = make_inputs(0, (3, 5))
    kept, results = [], []
    for is_recomputed in (False, True):
        torch._dynamo.reset()
        detector = recomputing(is_recomputed, dropout)
        forward = detector.forward_features
        forward = torch.compile(forward, fullgraph=True, dynamic=False) if compiles else forward
        for _ in range(2):  # the first pass compiles, which may leave memory behind
            detector.zero_grad()
            torch.manual_seed(7)
            before = torch.cuda.memory_allocated()
            predictions = forward(*inputs)
            after = torch.cuda.memory_allocated()
            loss = total_loss(Criterion(classes=detector.head.classes)(predictions, targets, inputs[-1]))
            loss.backward()
        kept.append(after - before)
        results.append((loss.item(), gradients(detector)))
    torch._dynamo.reset()
    assert kept[1] < 0.8 * kept[0]
    (loss, expected), (recomputed_loss, actual) = results
    assert recomputed_loss == pytest.approx(loss, rel=1e-5)
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max().item() <= 1e-4 * largest, name


def test_compiled_recomputed_layers_draw_the_same_dropout_twice():
    """The gradient is the slope of the loss along itself; with other numbers in the second pass it would not be."""
    torch._dynamo.reset()
    detector = recomputing(True, 0.5)
    inputs, _ = make_inputs(0, (3, 5))
    forward = torch.compile(detector.forward_features, fullgraph=True, dynamic=False)

    def loss():
        torch.manual_seed(7)
        return forward(*inputs).logits(0)[-1].square().mean()

    loss().backward()
    weights = [layer.cross_attention.out_proj.weight for layer in detector.decoder.layers]
    directions = [weight.grad / torch.stack([w.grad.norm() for w in weights]).norm() for weight in weights]
    slope = sum((weight.grad * direction).sum() for weight, direction in zip(weights, directions, strict=True)).item()
    ends = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
        ends.append(loss().item())  # with gradients: another graph might draw other numbers
    assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(slope, rel=0.02)
    torch._dynamo.reset()


def test_flex_equals_dense_in_float32():
    torch._dynamo.reset()
    inputs, targets = make_inputs(0, (3, 5))
    results = {}
    for backend in ("flex", "dense"):
        detector = make_detector(backend)
        results[backend] = train_step(detector, detector.forward_features, inputs, targets)
    (flex, flex_grads), (dense, dense_grads) = results["flex"], results["dense"]
    torch.testing.assert_close(flex.codes(0), dense.codes(0), rtol=1e-4, atol=1e-4)
    for name in ("aqr.scale.value", "aqr.generator.linear.weight", "reference_points.weight"):
        error = (flex_grads[name] - dense_grads[name]).abs().max() / dense_grads[name].abs().max()
        assert error <= 1e-3, name
    torch._dynamo.reset()


def test_plain_and_compiled_detector_agree():
    """Without a compiled detector the attention is compiled by itself."""
    torch._dynamo.reset()
    detector = make_detector()
    inputs, _ = make_inputs(0, (3, 5))
    with torch.no_grad():
        plain = detector.forward_features(*inputs)
        compiled = torch.compile(detector.forward_features, fullgraph=True, dynamic=False)(*inputs)
    # Metres, of a range of 108: float32 sums in another order through four layers.
    torch.testing.assert_close(plain.codes(0), compiled.codes(0), rtol=1e-3, atol=2e-3)
    torch._dynamo.reset()
