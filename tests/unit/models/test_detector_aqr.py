"""The detector with AQR: the bias reaches the scores of the right tokens, and gradients reach all that makes it."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.local_init import init_local
from tests.unit.attention.cases import grid_of_tokens, inside_by_loops
from tests.unit.models.test_detector import all_outputs, step
from tests.unit.models.tiny_detector import (
    IMAGE_SIZE,
    ONE_TASK,
    POINT_RANGE,
    gradients,
    make_aqr,
    make_detector,
    make_features,
    make_noised,
    make_targets,
    ring_of_cameras,
)

DESIGNS = ("bias", "v1", "v2")
NUM_DN = 10


def strong(detector):
    """Give the weight generator something to say: weights that differ from query to query."""
    torch.manual_seed(5)
    with torch.no_grad():
        torch.nn.init.normal_(detector.aqr.generator.linear.weight, std=1.0)
        detector.aqr.generator.linear.bias.zero_()
    return detector


def silence(detector, logit):
    """All weights equal to the activation of one logit."""
    with torch.no_grad():
        detector.aqr.generator.linear.weight.zero_()
        detector.aqr.generator.linear.bias.fill_(logit)
    return detector


def noised(targets=None, num_dn=NUM_DN):
    return make_noised(make_targets((3, 5)) if targets is None else targets, num_dn=num_dn)


def difference(left, right, rows=slice(None)):
    """Largest difference of any output of these queries."""
    right = all_outputs(right)
    return max((x[:, :, rows] - right[name][:, :, rows]).abs().max().item() for name, x in all_outputs(left).items())


@torch.no_grad()
@pytest.mark.parametrize(("design", "logit"), (("bias", 0.0), ("v1", 60.0), ("v2", 60.0)))
def test_weights_that_say_nothing_give_the_predictions_of_the_model_without_aqr(design, logit):
    plain = make_detector().forward_features(*make_features(2), noised())
    silent = silence(make_detector(design=design), logit).forward_features(*make_features(2), noised())
    assert (silent.aqr_weights == (0 if design == "bias" else 1)).all()
    assert plain.aqr_weights is None
    assert difference(silent, plain) < 1e-12
    loud = strong(make_detector(design=design)).forward_features(*make_features(2), noised())
    assert difference(loud, plain) > 1e-3


@torch.no_grad()
def test_the_bias_is_in_the_scores_of_all_layers():
    detector, features = strong(make_detector(design="bias")), make_features(2)
    bev_map, pv_maps, lidar2img, image_size = features
    denoising = noised()
    actual = detector.forward_features(*features, denoising)

    cameras = detector.make_cameras(pv_maps, lidar2img, image_size)
    tokens = detector.make_tokens(bev_map, pv_maps, cameras)
    queries = detector.make_queries(2, cameras, denoising)
    routed = detector.route(queries, tokens, cameras)
    weights = routed.weights
    bias = 2.5 * weights[..., grid_of_tokens(tokens.layout)] * inside_by_loops(routed.windows)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None])

    hidden = detector.decoder(
        queries.positions, tokens.values, tokens.positions, attention_mask=queries.attention_mask, attend=attend
    )
    expected = detector.head(hidden, queries.reference_points, num_dn=NUM_DN, is_valid=queries.is_valid)
    assert difference(actual, expected) < 1e-12
    assert torch.equal(actual.aqr_weights, weights[:, NUM_DN:])  # what is logged: matching queries only


def test_windows_lie_where_the_reference_points_are():
    detector, features = make_detector(design="bias"), make_features(2)
    cameras = detector.make_cameras(*features[1:])
    denoising = noised()
    queries = detector.make_queries(2, cameras, denoising)
    tokens = detector.make_tokens(*features[:2], cameras)
    windows = detector.route(queries, tokens, cameras).windows
    points = queries.reference_points.detach()
    assert windows.batch_and_queries == (2, NUM_DN + 12)
    low, high = torch.tensor(POINT_RANGE[:3]).double(), torch.tensor(POINT_RANGE[3:]).double()
    seen = 0
    for b, q in itertools.product(range(2), range(NUM_DN + 12)):
        x, y, _ = points[b, q].tolist()
        assert windows.cells[0][b, q].tolist() == [[0, min(math.floor(6 * y), 5), min(math.floor(6 * x), 5)]]
        metres = torch.cat((points[b, q] * (high - low) + low, torch.ones(1)))
        hits = []
        for view, matrix in enumerate(ring_of_cameras(1)[0]):
            u, v, depth, _ = (matrix @ metres.double()).tolist()
            if depth > 0 and 0 <= u / depth < IMAGE_SIZE[1] and 0 <= v / depth < IMAGE_SIZE[0]:
                hits.append([view, int(v / depth // 32), int(u / depth // 32)])
        expected = hits[0] if hits else [-1, 0, 0]
        assert windows.cells[1][b, q, 0].tolist() == expected
        seen += bool(hits)
    assert seen > 8
    valid = denoising.is_valid
    torch.testing.assert_close(points[:, :NUM_DN][:, valid], denoising.reference_points[:, valid].double())


@pytest.mark.parametrize("design", DESIGNS)
def test_a_few_steps_of_training_move_every_part(design):
    detector = make_detector(design=design)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    losses, weights = [], []
    for _ in range(8):
        denoising = noised()
        predictions = detector.forward_features(*make_features(2), denoising)
        loss = total_loss(Criterion(classes=ONE_TASK)(predictions, make_targets((3, 5)), denoising))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(predictions.aqr_weights)
    assert losses[-1] < losses[0]
    assert not weights[0].requires_grad
    assert (weights[-1] - weights[0]).abs().max() > 1e-3
    own = [name for name, _ in detector.named_parameters() if name.startswith("aqr.")]
    assert ("aqr.scale.value" in own) == (design == "bias")
    for name, parameter in detector.named_parameters():
        if name in own:
            assert (parameter - before[name]).abs().max() > 1e-4, name


def test_the_gradient_of_the_scale_is_that_of_the_loss():
    detector = strong(make_detector(design="bias"))

    def loss():
        return all_outputs(detector.forward_features(*make_features(2)))["0/center"].square().sum()

    loss().backward()
    scale, step_size = detector.aqr.scale.value, 1e-5
    with torch.no_grad():
        scale += step_size
        above = loss()
        scale -= 2 * step_size
        below = loss()
    assert scale.grad.item() == pytest.approx((above - below).item() / (2 * step_size), rel=1e-6)
    assert abs(scale.grad.item()) > 1e-3


@torch.no_grad()
def test_denoising_queries_have_weights_and_a_bias_of_their_own():
    plain, biased = make_detector(), strong(make_detector(design="bias"))
    outputs = [detector.forward_features(*make_features(2), noised()) for detector in (plain, biased)]
    features = make_features(2)
    cameras = biased.make_cameras(*features[1:])
    tokens, queries = biased.make_tokens(*features[:2], cameras), biased.make_queries(2, cameras, noised())
    weights = biased.route(queries, tokens, cameras).weights
    assert weights.shape == (2, NUM_DN + 12, 2)
    assert torch.equal(outputs[1].aqr_weights, weights[:, NUM_DN:])
    assert weights[:, :NUM_DN].std(dim=1).min() > 0.02
    assert difference(*outputs, slice(0, NUM_DN)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS)
def test_matching_queries_do_not_see_the_ground_truth(design):
    detector, features = strong(make_detector(design=design)).eval(), make_features(2)
    alone = detector.forward_features(*features)
    assert alone.aqr_weights.shape == (2, 12, 2)
    for seed in (2, 7):
        beside = detector.forward_features(*features, noised(make_targets((3, 5), seed=seed)))
        matching = {name: x[:, :, NUM_DN:] for name, x in all_outputs(beside).items()}
        for name, expected in all_outputs(alone).items():
            torch.testing.assert_close(matching[name], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(beside.aqr_weights, alone.aqr_weights, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("design", DESIGNS)
def test_padding_queries_change_no_output_no_loss_and_no_gradient(design):
    detector = strong(make_detector(design=design))
    features, targets = make_features(2), make_targets((3, 5))
    noise = torch.rand(2, 10, 3, dtype=torch.float64)
    tight = step(detector, features, targets, num_dn=10, noise=noise)
    wide = step(detector, features, targets, num_dn=31, noise=noise)
    for name, expected in all_outputs(tight[0]).items():
        torch.testing.assert_close(all_outputs(wide[0])[name][:, :, 21:], expected, rtol=1e-11, atol=1e-11)
    for left, right in zip(tight[1:], wide[1:], strict=True):
        for name, expected in left.items():
            torch.testing.assert_close(right[name], expected, rtol=1e-10, atol=1e-11, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS)
def test_a_batch_equals_its_samples_one_by_one(design):
    detector, features = strong(make_detector(design=design)).eval(), make_features(3)
    together = all_outputs(detector.forward_features(*features))
    for sample in range(3):
        one = [x[sample : sample + 1] if torch.is_tensor(x) else x for x in features]
        for name, alone in all_outputs(detector.forward_features(*one)).items():
            torch.testing.assert_close(together[name][:, sample], alone[:, 0], rtol=1e-10, atol=1e-10)


def test_recomputed_layers_give_the_same_gradients():
    gradients = []
    for is_recomputed in (False, True):
        detector = strong(make_detector(design="bias"))
        detector.decoder.checkpoint_layers = is_recomputed
        sum(x.square().sum() for x in all_outputs(detector.forward_features(*make_features(2))).values()).backward()
        gradients.append([p.grad for p in detector.aqr.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("design", ("bias", "v2"))
def test_one_graph_no_breaks_no_recompiles_and_the_same_numbers(design):
    detector = strong(make_detector(num_layers=1, design=design))
    torch._dynamo.reset()
    compiled = torch.compile(detector.forward_features, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, counts in enumerate(((3, 5), (0, 0))):
            features, denoising = make_features(2, seed=seed), noised(make_targets(counts, seed=seed))
            actual, expected = compiled(*features, denoising), detector.forward_features(*features, denoising)
            assert difference(actual, expected) < 1e-12
            assert torch.equal(actual.aqr_weights, expected.aqr_weights)
            total_loss(Criterion(classes=ONE_TASK)(actual, make_targets(counts, seed=seed), denoising)).backward()
    torch._dynamo.reset()


def test_recomputed_layers_in_one_graph_draw_the_same_dropout_and_give_the_same_gradients():
    losses, grads = [], []
    for is_recomputed in (False, True):
        torch._dynamo.reset()
        detector = strong(make_detector(design="bias", dropout=0.5, num_layers=1)).train()
        detector.decoder.checkpoint_layers = is_recomputed
        forward = torch.compile(detector.forward_features, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.manual_seed(3)
        loss = (forward if is_recomputed else detector.forward_features)(*make_features(2), noised()).codes(0).sum()
        loss.backward()
        losses.append(loss)
        grads.append(gradients(detector))
    torch._dynamo.reset()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-10, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("design", DESIGNS)
def test_autocast_keeps_weights_and_predictions_in_float32(design):
    detector = strong(make_detector(dtype=torch.float32, design=design)).eval()
    features = make_features(2, dtype=torch.float32)
    exact = detector.forward_features(*features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = detector.forward_features(*features)
    assert rounded.aqr_weights.dtype == torch.float32
    torch.testing.assert_close(rounded.aqr_weights, exact.aqr_weights, rtol=0, atol=0.1)
    for name, tensor in all_outputs(rounded).items():
        assert tensor.dtype == torch.float32
        if not name.endswith("center"):
            torch.testing.assert_close(tensor, all_outputs(exact)[name], rtol=0.1, atol=0.2)


def test_without_aqr_the_cross_attention_is_torchs_own():
    for detector in (make_detector(), make_detector(design="v1")):
        features = make_features(2)
        cameras = detector.make_cameras(*features[1:])
        tokens, queries = detector.make_tokens(*features[:2], cameras), detector.make_queries(2, cameras, None)
        routed = detector.route(queries, tokens, cameras)
        assert routed.attend is F.scaled_dot_product_attention
        assert (routed.tokens is tokens) == (detector.aqr is None)


def test_aqr_needs_to_know_where_bev_cells_lie():
    detector = make_detector()
    names = ("reference_points", "bev_embedding", "decoder", "head", "shared_conv", "ray_embedding")
    parts = {name: getattr(detector, name) for name in names}
    with pytest.raises(ValueError, match="AQR needs the origin and the size of BEV cells in metres, got None and None"):
        Detector(**parts, aqr=make_aqr("bias"))


@pytest.mark.parametrize(("sensors", "only"), (({"cameras": False}, "LiDAR"), ({"lidar": False}, "cameras")))
def test_a_detector_with_one_sensor_refuses_aqr(sensors, only):
    detector = make_detector(**sensors)
    names = ("reference_points", "bev_embedding", "decoder", "head", "shared_conv", "ray_embedding")
    parts = {name: getattr(detector, name) for name in names}
    with pytest.raises(ValueError, match=f"AQR weighs LiDAR against cameras, this detector has {only} only"):
        Detector(**parts, aqr=make_aqr("bias"))


def test_the_local_init_ties_the_generator_too():
    detector = make_detector(design="bias", dtype=torch.float32)
    init_local(detector)
    ours = detector.aqr.generator.layers[0].attention.in_proj_weight
    theirs = detector.decoder.layers[0].cross_attention.in_proj_weight
    dim = theirs.shape[1]
    assert torch.equal(ours[: 2 * dim], theirs[: 2 * dim])
    assert not torch.equal(ours[2 * dim :], theirs[2 * dim :])


def test_zeros_behind_the_tokens_change_nothing(monkeypatch):
    """What the flex evaluator is given; here the dense one reads it."""
    detector = strong(make_detector(design="bias")).eval()
    features = make_features(2)
    expected = detector.forward_features(*features)
    monkeypatch.setattr(type(detector.aqr), "token_length", lambda self, layout, device: layout.padded_length)
    cameras = detector.make_cameras(features[1], features[2], features[3])
    tokens = detector.make_tokens(features[0], features[1], cameras)
    assert tokens.values.shape[1] == tokens.layout.padded_length > tokens.layout.num_tokens
    assert tokens.positions.shape == tokens.values.shape
    assert difference(detector.forward_features(*features), expected) <= 1e-12
