"""The routers: the bias and the maps that they make, which queries have a say, what they log."""

import pytest
import torch
from torch.nn import functional as F

from cmt_aqr.aqr.modulation import modulate, render_map
from cmt_aqr.aqr.router import BiasRouter, ModulationRouter
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import WindowSettings, query_windows
from cmt_aqr.cameras import make_cameras
from cmt_aqr.tokens import Queries, Tokens
from cmt_aqr.tools.attention_cases import POINT_RANGE, nuscenes_lidar2img
from tests.unit.attention.cases import BOTH, THREE, attention_by_loops, grid_of_tokens, inside_by_loops

DIM = 8
IMAGE_SIZE = (64, 96)
LAYOUTS = {"two": BOTH, "three": THREE}


def make_generator(num_grids, activation, neutral):
    """Weights of all sizes in their range."""
    torch.manual_seed(0)
    generator = WeightGenerator(
        dim=DIM, num_heads=2, ffn_dim=8, num_layers=1, num_grids=num_grids, activation=activation, neutral=neutral
    ).double()
    torch.nn.init.normal_(generator.linear.weight)
    return generator


def settings_of(layout, **options):
    sizes = {"lidar": 3, "camera": 4, "radar": 3}
    return WindowSettings({grid.name: sizes[grid.name] for grid in layout.grids}, **options)


def bias_router(layout=BOTH, *, scale=2.5, max_bias=5.0, backend="dense", **options):
    router = BiasRouter(
        generator=make_generator(len(layout.grids), "tanh", 0.0),
        windows=settings_of(layout, **options),
        point_range=POINT_RANGE,
        scale=Scale(value=scale, is_learned=True, limits=(0.5, 5.0)),
        max_bias=max_bias,
        backend=backend,
    )
    return router.double()


def modulation_router(design, layout=BOTH):
    router = ModulationRouter(
        design=design,
        generator=make_generator(len(layout.grids), "sigmoid", 1.0),
        windows=settings_of(layout),
        point_range=POINT_RANGE,
    )
    return router.double()


def make_inputs(layout, *, num_dn=3, num_queries=9):
    """Queries, tokens and cameras as the detector hands them over."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    points = torch.rand(2, num_queries, 3, generator=generator, dtype=torch.float64)
    queries = Queries(points, draw(num_queries, DIM), num_dn=num_dn)
    tokens = Tokens(draw(layout.num_tokens, DIM), draw(layout.num_tokens, DIM), layout)
    lidar2img = nuscenes_lidar2img(IMAGE_SIZE)[:3].expand(2, -1, -1, -1)
    return queries, tokens, make_cameras(lidar2img, IMAGE_SIZE, dtype=torch.float64)


def expected_windows(queries, tokens, cameras, settings, first=0):
    return query_windows(
        queries.reference_points[:, first:],
        cameras.lidar2img,
        layout=tokens.layout,
        point_range=POINT_RANGE,
        image_size=IMAGE_SIZE,
        settings=settings,
    )


def random_qkv(layout, num_queries=9):
    generator = torch.Generator().manual_seed(2)
    lengths = (num_queries, layout.num_tokens, layout.num_tokens)
    return [torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in lengths]


@pytest.mark.parametrize("is_local", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_bias_is_the_clamped_product_in_the_windows_of_its_grid(layout, is_local):
    router = bias_router(layout, scale=4.0, max_bias=1.5, is_local=is_local)
    queries, tokens, cameras = make_inputs(layout)
    routed = router(queries, tokens, cameras)
    windows = expected_windows(queries, tokens, cameras, router.settings)
    assert routed.tokens is tokens
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(routed.windows.cells, windows.cells, strict=True))
    weights = router.generator(queries.positions, tokens.values, tokens.positions, windows)
    assert weights.shape == (2, 9, len(layout.grids)) and torch.equal(routed.weights, weights)
    assert ((4.0 * weights).abs() > 1.5).any() and ((4.0 * weights).abs() < 1.5).any()
    inside = inside_by_loops(windows) if is_local else torch.ones(2, 9, layout.num_tokens, dtype=torch.bool)
    bias = (4.0 * weights).clamp(-1.5, 1.5)[..., grid_of_tokens(layout)] * inside
    q, k, v = random_qkv(layout)
    expected, _ = attention_by_loops(q, k, v, bias)
    torch.testing.assert_close(routed.attend(q, k, v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "max_bias", "largest"), ((5.0, 10.0, 5.0), (5.0, 4.0, 4.0), (1.0, None, 1.0), (5.0, None, 5.0))
)
def test_clips_and_no_clip(scale, max_bias, largest):
    router = bias_router(scale=scale, max_bias=max_bias, is_local=False)
    with torch.no_grad():
        router.generator.linear.weight.zero_()
        router.generator.linear.bias.copy_(torch.tensor([50.0, -50.0]))  # all weights 1 and -1
    routed = router(*make_inputs(BOTH))
    q, k, v = random_qkv(BOTH)
    sign = 1 - 2 * grid_of_tokens(BOTH).double()
    expected, _ = attention_by_loops(q, k, v, (largest * sign).expand(2, 9, -1))
    torch.testing.assert_close(routed.attend(q, k, v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_reach_the_generator_and_the_scale(layout):
    router = bias_router(layout)
    router(*make_inputs(layout)).attend(*random_qkv(layout)).square().sum().backward()
    assert router.scale.value.grad.abs().item() > 1e-3
    assert (router.generator.linear.weight.grad.abs().amax(dim=1) > 1e-4).all()  # of every grid


def test_checkpoints_keep_their_names():
    assert {name.split(".")[0] for name in bias_router().state_dict()} == {"generator", "scale"}
    assert "scale.value" in bias_router().state_dict()
    assert {name.split(".")[0] for name in modulation_router("v1").state_dict()} == {"generator"}


def test_the_attention_has_the_energy():
    router, inputs = bias_router(backend="lowrank"), make_inputs(BOTH)
    q, k, v = random_qkv(BOTH)
    expected = bias_router()(*inputs).attend(q, k, v)
    errors = []
    for router.lowrank_energy in (0.5, 1.0):
        with pytest.warns(UserWarning, match=f"{100 * router.lowrank_energy:g} % of its energy"):
            errors.append((router(*inputs).attend(q, k, v) - expected).abs().max())
    assert errors[1] < 1e-10 < 1e-3 < errors[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("design", ("v1", "v2"))
def test_maps_are_drawn_by_matching_queries_alone(design, layout):
    router = modulation_router(design, layout)
    queries, tokens, cameras = make_inputs(layout, num_dn=3)
    routed = router(queries, tokens, cameras)
    assert routed.attend is F.scaled_dot_product_attention
    windows = expected_windows(queries, tokens, cameras, router.settings, first=3)
    weights = router.generator(queries.positions[:, 3:], tokens.values, tokens.positions, windows)
    assert torch.equal(routed.weights, weights) and routed.windows.batch_and_queries == (2, 6)
    expected = modulate(tokens.values, render_map(windows, weights), design)
    assert torch.equal(routed.tokens.values, expected) and not torch.equal(expected, tokens.values)
    assert routed.tokens.positions is tokens.positions


@pytest.mark.parametrize("make", (bias_router, lambda: modulation_router("v1")))
def test_grids_in_another_order_are_refused(make):
    queries, tokens, cameras = make_inputs(THREE)
    message = (
        r"AQR with windows for \['lidar', 'camera'\] cannot weigh tokens of the grids \['lidar', 'camera', 'radar'\]"
    )
    with pytest.raises(ValueError, match=message):
        make()(queries, tokens, cameras)


def test_tokens_are_padded_for_flex_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert BOTH.num_tokens == 107 and BOTH.padded_length == 128
    assert bias_router(backend="auto").token_length(BOTH, gpu) == 128
    assert bias_router(backend="auto").token_length(BOTH, cpu) == 107
    assert bias_router(backend="score_mod").token_length(BOTH, gpu) == 107
    assert modulation_router("v1").token_length(BOTH, gpu) == 107


def test_what_the_log_is_told_of_the_router():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    bias = "AQR bias in the cross-attention, computed by"
    assert bias_router(backend="auto").describe(cpu) == f"{bias} dense (picked by auto)"
    assert bias_router(backend="auto").describe(gpu) == f"{bias} flex (picked by auto)"
    assert bias_router(backend="lowrank").describe(gpu) == f"{bias} lowrank"
    assert modulation_router("v2").describe(gpu) == "AQR v2: weights modulate the token features"


def test_metrics_for_the_log():
    weights = torch.tensor([[[0.5, -0.25], [-0.5, 0.75]]])
    router = bias_router(scale=2.5)
    with torch.no_grad():
        router.scale.value.fill_(9.0)  # what counts is what the forward pass uses
    metrics = router.metrics(weights)
    assert {name: value.item() for name, value in metrics.items()} == {
        "aqr_weight_lidar": 0.5,
        "aqr_weight_camera": 0.5,
        "aqr_scale": 5.0,
    }
    assert not any(value.requires_grad for value in metrics.values())
    assert set(modulation_router("v1").metrics(weights)) == {"aqr_weight_lidar", "aqr_weight_camera"}


def test_only_the_scale_has_limits():
    router = bias_router()
    with torch.no_grad():
        router.scale.value.fill_(9.0)
    router.clamp_parameters()
    assert router.scale.value.item() == 5.0
    before = {name: x.clone() for name, x in modulation_router("v1").state_dict().items()}
    router = modulation_router("v1")
    router.clamp_parameters()
    assert all(torch.equal(x, before[name]) for name, x in router.state_dict().items())
