"""FlexAttention's plain form: the score_mod against loops; on a GPU: tests/gpu."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from cmt_aqr.attention import attend, score_mod
from cmt_aqr.attention.dense import dense_attention, dense_bias
from cmt_aqr.attention.score_mod import make_score_mod
from tests.unit.attention.cases import LAYOUTS, THREE, bias_by_loops, random_bias, random_qkv, random_windows, sized

SETTINGS = {
    "first camera": sized(3, 4),
    "all cameras": sized(3, 4, camera_assignment="all"),
    "whole grid": sized(3, 4, is_local=False),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_added_to_a_score_is_the_bias(layout, settings):
    bias = random_bias(random_windows(layout, settings))
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(9), torch.arange(layout.num_tokens), indexing="ij")
    scores = torch.randn(b.shape, dtype=torch.float64)
    added = make_score_mod(bias)(scores, b, torch.tensor(0), q, k) - scores
    torch.testing.assert_close(added, bias_by_loops(bias), rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_flex_attention_with_it_equals_dense(settings):
    """PyTorch's own FlexAttention without a compiler, which has an lse on a CPU too."""
    windows = random_windows(THREE, settings)
    mask = torch.arange(THREE.num_tokens).expand(2, -1) % 3 > 0
    q, k, v = random_qkv(windows, dim=16)
    bias = random_bias(windows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was not compiled
        out, aux = flex_attention(q, k, v, make_score_mod(bias, mask), return_aux=AuxRequest(lse=True))
    expected = dense_attention(q, k, v, bias, token_mask=mask)
    for ours, theirs in zip((out, aux.lse), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_of_the_values(settings):
    bias = random_bias(random_windows(THREE, settings))
    values = bias.values.requires_grad_()
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(9), torch.arange(THREE.num_tokens), indexing="ij")
    upstream = torch.randn(b.shape, dtype=torch.float64)
    grads = [
        torch.autograd.grad((upstream * added).sum(), values)[0]
        for added in (make_score_mod(bias)(torch.zeros(()), b, torch.tensor(0), q, k), dense_bias(bias))
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert (grads[0].abs().amax(dim=(0, 1)) > 0.1).all()


def float32_case(seed=0):
    windows = random_windows(THREE, sized(3, 4), seed=seed)
    bias = random_bias(windows, dtype=torch.float32)
    return [x.float() for x in random_qkv(windows, dim=16)], bias


def outputs_of_the_backend():
    qkv, bias = float32_case()
    mask = torch.arange(THREE.num_tokens).expand(2, -1) % 3 > 0
    out, lse = attend(*qkv, bias, backend="score_mod", token_mask=mask)
    torch.testing.assert_close(out, dense_attention(*qkv, bias, token_mask=mask)[0], rtol=1e-5, atol=1e-6)
    assert lse is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_backend_on_a_cpu_gives_outputs_alone(monkeypatch):
    monkeypatch.setattr(score_mod, "_compiled_flex_attention", flex_attention)
    outputs_of_the_backend()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_other_windows_do_not_compile_anew(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(flex_attention, backend=count, dynamic=False, fullgraph=True)
    monkeypatch.setattr(score_mod, "_compiled_flex_attention", compiled)
    torch._dynamo.reset()
    for seed in range(3):
        qkv, bias = float32_case(seed)
        out, _ = attend(*qkv, bias, backend="score_mod")
        torch.testing.assert_close(out, dense_attention(*qkv, bias)[0], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.e2e  # a minute of C++ compiler
def test_the_compiled_backend_on_a_cpu():
    outputs_of_the_backend()


def test_what_it_cannot_compute_is_refused():
    (q, k, v), bias = float32_case()
    message = r"^the score_mod backend has no backward pass on a CPU; use dense, or torch.no_grad\(\)$"
    for leaf in (q, bias.values):
        leaf.requires_grad_()
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, bias, backend="score_mod")
        leaf.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^the score_mod backend needs heads of at least 16 channels, got 8; use dense$"
    ):
        attend(*(x[..., :8] for x in (q, k, v)), bias, backend="score_mod")
    with pytest.raises(ValueError, match=r"^the score_mod backend computes in float32, bfloat16 or float16, got"):
        attend(*(x.double() for x in (q, k, v)), bias, backend="score_mod")
