"""FlexAttention with the bias on CUDA against the dense evaluator in float64, with gradients."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from cmt_aqr.attention import AttentionBias, attend, bias_values
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from tests.unit.attention.cases import THREE, sized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
HEADS, HEAD_DIM = 4, 32
SMALL = fusion_layout((24, 24), (6, 10, 25))
# The grid of r50 is smaller than the point range: one query in ten has no BEV window (Quirk Q13).
R50 = fusion_layout((128, 128), (6, 20, 50), cell_size=(0.8, 0.8))
LIDAR_ONLY, CAMERA_ONLY = fusion_layout((24, 24), None), fusion_layout(None, (6, 10, 25))
ODD = fusion_layout((19, 23), (6, 10, 25))
NUM_DRAWS = 6


def make_case(layout, num_queries, *, settings=None, batch_size=2, seed=0, zero=False):
    """Windows and float64 leaves q, k, v, weights (B, Q, G), scale (1,) on the GPU."""
    settings = settings or sized()
    windows = make_windows(layout, batch_size, num_queries, device="cuda", seed=seed, settings=settings)
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64)

    q = draw(batch_size, HEADS, num_queries, HEAD_DIM)
    k, v = (draw(batch_size, HEADS, layout.num_tokens, HEAD_DIM) for _ in range(2))
    weights = draw(batch_size, num_queries, len(layout.grids)).tanh() * (0 if zero else 1)
    scale = torch.tensor([2.5], device="cuda", dtype=torch.float64)
    return windows, [q, k, v, weights, scale]


def run(windows, leaves, backend, dtype, *, token_mask=None, padded=False):
    """Outputs and gradients of a fixed weighting of out and lse, in float64."""
    leaves = [leaf.to(dtype if i < 3 else torch.promote_types(dtype, torch.float32)) for i, leaf in enumerate(leaves)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    q, k, v, weights, scale = leaves
    if padded:
        missing = windows.layout.padded_length - k.shape[2]
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (k, v))
    bias = AttentionBias(windows, bias_values(weights, scale, 5.0))
    out, lse = attend(q, k, v, bias, backend=backend, token_mask=token_mask)
    generator = torch.Generator("cuda").manual_seed(9)
    by_out = torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.float64)
    by_lse = torch.randn(lse.shape, generator=generator, device="cuda", dtype=torch.float64)
    seen = torch.where(lse.isfinite(), lse, 0)
    loss = (out * by_out.to(out.dtype)).sum() + (seen * by_lse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [x.detach().double() for x in (out, lse, *grads)]


def error(x, reference):
    return ((x - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


CASES = {
    "r50": (R50, 900, None),
    "few queries": (SMALL, 37, None),
    "several blocks": (SMALL, 200, None),
    "odd grid": (ODD, 130, None),
    "one cell": (SMALL, 70, sized(1, 1)),
    "large windows": (SMALL, 70, sized(15, 15)),
    "every camera": (SMALL, 150, sized(5, 8, camera_assignment="all")),
    "unseen at the corner": (SMALL, 150, sized(5, 8, unseen="corner")),
    "whole grid": (ODD, 100, sized(5, 8, is_local=False)),
    "lidar only": (LIDAR_ONLY, 100, None),
    "camera only": (CAMERA_ONLY, 100, None),
    "three grids": (THREE, 100, None),
}


# The detector pads its tokens; every length without padding is a kernel more to compile.
PADDED = [(name, True) for name in CASES] + [("few queries", False), ("odd grid", False), ("camera only", False)]


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_float32_equals_dense_float64(name, padded):
    layout, num_queries, settings = CASES[name]
    windows, leaves = make_case(layout, num_queries, settings=settings)
    expected = run(windows, leaves, "dense", torch.float64)
    actual = run(windows, leaves, "flex", torch.float32, padded=padded)
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors[:2]) <= 2e-6, errors
    assert max(errors[2:]) <= 1e-5, errors


@pytest.mark.parametrize("name", ["r50", "odd grid", "every camera", "whole grid", "three grids"])
def test_score_mod_equals_dense_float64(name):
    """FlexAttention's plain form, with the gradients of weights and scale through captured tensors.

    It adds up the 22 384 tokens of r50 one block after the other, which costs more roundings than flex's partitions:
    the error of out is 5.2e-6 there.
    """
    layout, num_queries, settings = CASES[name]
    windows, leaves = make_case(layout, num_queries, settings=settings)
    expected = run(windows, leaves, "dense", torch.float64)
    actual = run(windows, leaves, "score_mod", torch.float32)
    out, lse, *gradients = errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert out <= (1e-5 if name == "r50" else 2e-6), errors
    assert lse <= 2e-6, errors
    assert max(gradients) <= 1e-5, errors


def test_score_mod_with_a_token_mask():
    windows, leaves = make_case(SMALL, 100)
    token_mask = torch.rand(2, SMALL.num_tokens, device="cuda") < 0.5
    expected = run(windows, leaves, "dense", torch.float64, token_mask=token_mask)
    actual = run(windows, leaves, "score_mod", torch.float32, token_mask=token_mask)
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= 1e-5, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["r50", "several blocks", "every camera", "whole grid"])
def test_half_precision_is_as_good_as_dense(name, dtype):
    layout, num_queries, settings = CASES[name]
    squares = {"flex": 0.0, "dense": 0.0}
    # Root mean square over several draws: the gradient of the scale is one number, whose roundings cancel by chance, so
    # in a single draw the ratio of its errors lies anywhere between 0.02 and 3.
    for seed in range(NUM_DRAWS):
        windows, leaves = make_case(layout, num_queries, settings=settings, seed=seed)
        leaves = [leaf.to(dtype).double() if i < 3 else leaf for i, leaf in enumerate(leaves)]
        expected = run(windows, leaves, "dense", torch.float64)
        for backend in squares:
            errors = [error(x, ref) for x, ref in zip(run(windows, leaves, backend, dtype), expected, strict=True)]
            squares[backend] = squares[backend] + torch.tensor(errors).square()
    ratios = (squares["flex"] / squares["dense"]).sqrt().tolist()
    names = ("out", "lse", "q", "k", "v", "weights", "scale")
    assert max(ratios) <= 1.5, dict(zip(names, ratios, strict=True))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_window_that_holds_all_the_mass(sign):
    """Scores that are high inside the window only, with the bias at its clamp: nothing cancels."""
    windows, leaves = make_case(SMALL, 100)
    bias = AttentionBias(windows, torch.ones(2, 100, 2, device="cuda"))
    from cmt_aqr.attention.dense import dense_bias

    inside = dense_bias(bias).double()
    q, k, v, weights, scale = leaves
    # The mean key of a query's window, so that its own window scores highest.
    q = 6 * (inside[:, None] @ k) / inside.sum(-1)[:, None, :, None]
    leaves = [q, k, v, torch.full_like(weights, 10.0 * sign), scale]
    expected = run(windows, leaves, "dense", torch.float64)
    actual = run(windows, leaves, "flex", torch.float32)
    assert max(error(a, e) for a, e in zip(actual[:4], expected[:4], strict=True)) <= 1e-5


def test_zero_weights_are_no_bias_and_have_a_gradient():
    windows, leaves = make_case(SMALL, 100, zero=True)
    actual = run(windows, leaves, "flex", torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(*leaves[:3])
    assert error(actual[0], plain) <= 2e-6
    assert actual[5].abs().max() > 1e-3


def test_the_same_bits_every_time():
    windows, leaves = make_case(R50, 900)
    first, second = (run(windows, leaves, "flex", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_token_mask(padded):
    windows, leaves = make_case(SMALL, 100)
    token_mask = torch.rand(2, SMALL.num_tokens, device="cuda") < 0.5
    token_mask[1] = False
    expected = run(windows, leaves, "dense", torch.float64, token_mask=token_mask)
    actual = run(windows, leaves, "flex", torch.float32, token_mask=token_mask, padded=padded)
    assert actual[0][1].eq(0).all()
    assert actual[1][1].eq(-math.inf).all()
    expected[1], actual[1] = (x[:1] for x in (expected[1], actual[1]))
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= 1e-5, errors


def test_no_recompilation_while_contents_change():
    counters.clear()
    for seed in range(3):
        windows, leaves = make_case(SMALL, 100, seed=seed)
        expected = run(windows, leaves, "dense", torch.float64)
        assert error(run(windows, leaves, "flex", torch.float32)[0], expected[0]) <= 2e-6
        if seed == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_refusals():
    windows, leaves = make_case(SMALL, 100)
    q, k, v = leaves[:3]
    bias = AttentionBias(windows, leaves[3])
    with pytest.raises(ValueError, match="float64; use dense"):
        attend(q, k, v, bias, backend="flex")
    with pytest.raises(ValueError, match="at least 16 channels, got 8"):
        attend(*(x[..., :8].float() for x in (q, k, v)), bias, backend="flex")


def test_memory_beside_attention_without_bias():
    """Only what is as long as the queries is added, a few copies of it; nothing of [queries x tokens]."""
    windows, leaves = make_case(R50, 900, batch_size=1)
    leaves = [leaf.to(torch.bfloat16 if i < 3 else torch.float32) for i, leaf in enumerate(leaves)]
    bias = AttentionBias(windows, leaves[3])

    def peak(function):
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    with torch.no_grad():
        plain = peak(lambda: torch.nn.functional.scaled_dot_product_attention(*leaves[:3]))
        ours = peak(lambda: attend(*leaves[:3], bias, backend="flex"))
    assert ours - plain <= 16
