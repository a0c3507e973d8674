"""AQR as a module: which design has what, the bias that it makes, what it says of itself."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import cmt_aqr.aqr
from cmt_aqr.aqr.module import AQR, neutral_weight
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import WindowSettings
from cmt_aqr.attention.dense import dense_bias
from tests.unit.attention.cases import BOTH, attention_by_loops, inside_by_loops, random_qkv, random_windows

FOLDER = Path(cmt_aqr.aqr.__file__).parent


def make_aqr(design="bias", *, scale=2.5, limits=(0.5, 5.0), max_bias=5.0, backend="dense"):
    activation = "tanh" if design == "bias" else "sigmoid"
    return AQR(
        design=design,
        generator=WeightGenerator(
            dim=8, num_heads=2, ffn_dim=8, num_layers=1, activation=activation, neutral=neutral_weight(design)
        ),
        windows=WindowSettings(),
        point_range=(-54, -54, -5, 54, 54, 3),
        bev_cell_size=(18.0, 18.0),
        scale=None if scale is None else Scale(value=scale, is_learned=True, limits=limits),
        max_bias=max_bias,
        backend=backend,
    )


@pytest.mark.parametrize("is_local", (True, False))
def test_the_bias_is_the_clamped_product_in_the_windows_of_its_modality(is_local):
    windows = random_windows(BOTH, WindowSettings(bev=3, camera=4, is_local=is_local), queries=5)
    weights = torch.tensor([1.0, -0.9, 0.7, -0.2, 0.0])[None, :, None] * torch.tensor([1.0, -0.5])
    bias = dense_bias(make_aqr(scale=4.0, max_bias=3.0).bias(windows, weights.expand(2, -1, -1)))
    inside = inside_by_loops(windows) if is_local else torch.ones(2, 5, BOTH.num_tokens, dtype=torch.bool)
    lidar = torch.tensor([3.0, -3.0, 2.8, -0.8, 0.0])[None, :, None]
    camera = torch.tensor([-2.0, 1.8, -1.4, 0.4, 0.0])[None, :, None]
    is_bev = torch.arange(BOTH.num_tokens) < BOTH.num_bev
    torch.testing.assert_close(bias, torch.where(is_bev, lidar, camera) * inside)


@pytest.mark.parametrize(
    ("scale", "max_bias", "largest"), ((5.0, 10.0, 5.0), (5.0, 4.0, 4.0), (1.0, None, 1.0), (5.0, None, 5.0))
)
def test_clips_and_no_clip(scale, max_bias, largest):
    windows = random_windows(BOTH)
    bias = make_aqr(scale=scale, max_bias=max_bias).bias(windows, torch.ones(2, 9, 2))
    assert dense_bias(bias).max() == largest


def test_gradients_reach_the_weights_and_the_scale():
    aqr, windows = make_aqr(), random_windows(BOTH, queries=3)
    weights = torch.full((2, 3, 2), 0.5, requires_grad=True)
    bias = aqr.bias(windows, weights)
    bias.strength.sum().backward()
    assert aqr.scale.value.grad.item() == pytest.approx(12 * 0.5)
    torch.testing.assert_close(weights.grad, torch.full_like(weights, 2.5))


def test_a_design_has_a_scale_exactly_if_it_makes_a_bias():
    with pytest.raises(ValueError, match="design 'bias' without a scale"):
        make_aqr("bias", scale=None)
    for design in ("v1", "v2"):
        assert "scale.value" not in make_aqr(design, scale=None).state_dict()
        with pytest.raises(ValueError, match=f"design '{design}' with a scale"):
            make_aqr(design)


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match=r"^the design of AQR must be one of bias, v1, v2, got 'v3'$"):
        make_aqr("v3", scale=None)


def test_the_attention_has_the_bias_and_the_energy():
    windows = random_windows(BOTH)
    q, k, v = random_qkv(windows)
    aqr = make_aqr().double()
    bias = aqr.bias(windows, torch.randn(2, 9, 2, dtype=torch.float64).tanh())
    expected = attention_by_loops(q, k, v, dense_bias(bias))
    for actual, reference in zip(aqr.attend(bias)(q, k, v), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)
    aqr.backend = "lowrank"
    errors = []
    for aqr.lowrank_energy in (0.5, 1.0):
        with pytest.warns(UserWarning, match=f"{100 * aqr.lowrank_energy:g} % of its energy"):
            out, _ = aqr.attend(bias)(q, k, v)
        errors.append((out - expected[0]).abs().max())
    assert errors[1] < 1e-10 < 1e-3 < errors[0]


def test_denoising_queries_have_a_say_in_the_bias_only():
    assert make_aqr("bias").first_query(7) == 0
    assert make_aqr("v1", scale=None).first_query(7) == 7


def test_what_it_says():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert make_aqr(backend="auto").describe(cpu).endswith("computed by dense (picked by auto)")
    assert make_aqr(backend="auto").describe(gpu).endswith("computed by flex (picked by auto)")
    assert make_aqr(backend="dense").describe(gpu).endswith("computed by dense")
    assert make_aqr("v2", scale=None).describe(cpu).startswith("AQR v2")


def test_figures_for_the_log():
    weights = torch.tensor([[[0.5, -0.25], [-0.5, 0.75]]])
    aqr = make_aqr(scale=2.5)
    with torch.no_grad():
        aqr.scale.value.fill_(9.0)  # what counts is what the forward pass uses
    figures = aqr.figures(weights)
    assert {name: value.item() for name, value in figures.items()} == {
        "aqr_weight_lidar": 0.5,
        "aqr_weight_camera": 0.5,
        "aqr_scale": 5.0,
    }
    assert not any(value.requires_grad for value in figures.values())
    assert set(make_aqr("v1", scale=None).figures(weights)) == {"aqr_weight_lidar", "aqr_weight_camera"}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_the_room_stands_on_the_ground(file):
    allowed = ("cmt_aqr.aqr", "cmt_aqr.attention", "cmt_aqr.geometry", "cmt_aqr.boxes")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = module.split(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names or module.startswith(allowed), module
