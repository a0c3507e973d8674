"""The reference evaluator against the formula, one query at a time."""

import math

import pytest
import torch

from cmt_aqr.attention import AttentionBias
from cmt_aqr.attention.dense import dense_attention, dense_bias, softmax_with_lse
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import (
    BOTH,
    LAYOUTS,
    attention_by_loops,
    bias_by_loops,
    num_lidar,
    random_bias,
    random_qkv,
    random_windows,
    sized,
)

SETTINGS = {
    "first camera": sized(3, 4),
    "all cameras": sized(3, 4, camera_assignment="all"),
    "whole grid": sized(5, 8, is_local=False),
}


def random_mask(layout, *, batch=2, seed=4):
    """(B, K) bool; the last sample may attend to nothing."""
    mask = torch.rand(batch, layout.num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[-1] = False
    return mask


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bias_equals_its_definition(layout, settings):
    bias = random_bias(random_windows(layout, settings))
    expected = bias_by_loops(bias)
    assert torch.equal(dense_bias(bias), expected)
    assert torch.equal(dense_bias(bias, slice(3, 7)), expected[:, 3:7])


@pytest.mark.parametrize("is_masked", (False, True), ids=("all tokens", "masked"))
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_equals_its_definition(layout, settings, is_masked):
    windows = random_windows(layout, settings)
    bias, qkv = random_bias(windows, scale=4.0), random_qkv(windows)
    mask = random_mask(layout) if is_masked else None
    out, lse = dense_attention(*qkv, bias, token_mask=mask)
    expected, expected_lse = attention_by_loops(*qkv, bias_by_loops(bias), mask)
    assert out.dtype == lse.dtype == torch.float64
    assert (out - expected).abs().max() < 1e-13
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse - expected_lse)[finite].abs().max() < 1e-13
    # The lse, because a bias on all tokens alike does not change the output.
    _, unbiased_lse = dense_attention(*qkv, None, token_mask=mask)
    assert (unbiased_lse - lse)[finite].abs().max() > 0.1


def test_without_a_bias():
    windows = random_windows(BOTH)
    qkv = random_qkv(windows)
    out, lse = dense_attention(*qkv, None)
    expected, expected_lse = attention_by_loops(*qkv, torch.zeros(2, 9, BOTH.num_tokens))
    assert (out - expected).abs().max() < 1e-13 and (lse - expected_lse).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    windows = random_windows(BOTH)
    bias, qkv = random_bias(windows, dtype=torch.float32), [x.to(dtype) for x in random_qkv(windows)]
    out, lse = dense_attention(*qkv, bias)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected, expected_lse = attention_by_loops(*qkv, bias_by_loops(bias))
    limit = {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    assert (out - expected).abs().max() < limit and (lse - expected_lse).abs().max() < limit


def test_large_scores_do_not_overflow():
    windows = random_windows(BOTH)
    q, k, v = random_qkv(windows, dtype=torch.float32)
    bias = random_bias(windows, dtype=torch.float32)
    out, lse = dense_attention(q * 1e3, k, v, bias)
    expected, expected_lse = attention_by_loops(q * 1e3, k, v, bias_by_loops(bias))
    assert (out - expected).abs().max() < 1e-3
    assert ((lse - expected_lse) / expected_lse).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", (1, 4, 9, 1000))
def test_the_chunk_changes_nothing(chunk):
    windows = random_windows(BOTH)
    bias, qkv, mask = random_bias(windows), random_qkv(windows), random_mask(BOTH)
    out, lse = dense_attention(*qkv, bias, token_mask=mask, query_chunk=chunk)
    expected, expected_lse = dense_attention(*qkv, bias, token_mask=mask)
    assert (out - expected).abs().max() < 1e-14
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert (lse - expected_lse)[0].abs().max() < 1e-14


def test_more_queries_than_a_chunk():
    windows = random_windows(BOTH, batch=1, queries=300)
    bias, qkv = random_bias(windows), random_qkv(windows, heads=1)
    out, lse = dense_attention(*qkv, bias)
    expected, expected_lse = attention_by_loops(*qkv, bias_by_loops(bias))
    assert (out - expected).abs().max() < 1e-13 and (lse - expected_lse).abs().max() < 1e-13


def test_rows_without_a_token_give_zero_and_no_gradient():
    windows = random_windows(BOTH)
    mask = random_mask(BOTH)
    leaves = [x.requires_grad_() for x in random_qkv(windows)]
    values = random_bias(windows).values.requires_grad_()
    out, lse = dense_attention(*leaves, AttentionBias(windows, values), token_mask=mask)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and (lse[1] == -math.inf).all()
    assert lse[0].isfinite().all()
    # The lse of such a row is used by nobody, but its gradient must not be NaN either.
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), (*leaves, values))
    for grad in grads:
        assert grad.isfinite().all()
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
        assert grad[0].abs().max() > 1e-3
    # A token that may not be attended to gets nothing.
    assert torch.equal(grads[1][0][:, ~mask[0]], torch.zeros_like(grads[1][0][:, ~mask[0]]))


def test_scores_of_minus_infinity():
    scores = torch.tensor([[[[0.0, -math.inf], [-math.inf, -math.inf]]]])
    out, lse = softmax_with_lse(scores, torch.tensor([[[[2.0, 3.0], [5.0, 7.0]]]]))
    assert out.tolist() == [[[[2.0, 3.0], [0.0, 0.0]]]]
    assert lse.tolist() == [[[0.0, -math.inf]]]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings):
    layout = fusion_layout((4, 3), (2, 3, 2))
    windows = random_windows(layout, settings, queries=3)
    leaves = [x.requires_grad_() for x in random_qkv(windows, heads=1, dim=2)]
    values = random_bias(windows).values.requires_grad_()
    mask = random_mask(layout)
    mask[-1, :3] = True

    def evaluate(q, k, v, values):
        return dense_attention(q, k, v, AttentionBias(windows, values), token_mask=mask, query_chunk=2)

    assert torch.autograd.gradcheck(evaluate, (*leaves, values))


def test_gradient_of_the_values_by_hand():
    # d lse / d bias is the mass of attention in the window.
    windows = random_windows(BOTH)
    qkv = random_qkv(windows)
    values = random_bias(windows).values.requires_grad_()
    bias = AttentionBias(windows, values)
    _, lse = dense_attention(*qkv, bias)
    (grad,) = torch.autograd.grad(lse.sum(), values)
    q, k, _ = qkv
    weights = (q @ k.mT / 2 + bias_by_loops(bias).detach()[:, None]).softmax(dim=-1).sum(dim=1)
    inside = bias_by_loops(AttentionBias(windows, torch.ones_like(values).detach())) * weights
    expected = torch.stack((inside[..., : num_lidar(BOTH)].sum(-1), inside[..., num_lidar(BOTH) :].sum(-1)), dim=-1)
    assert (grad - expected).abs().max() < 1e-13
    no_window = windows.cells[1][..., 0, 0] < 0
    assert no_window.any() and (grad[no_window][:, 1] == 0).all()


@pytest.mark.parametrize("scores", [[0.0, 1e-9], [0.3, 0.3 + 3e-8], [0.0, 0.0]])
def test_gradient_of_the_lse_where_shares_are_the_same(scores):
    """Scores that differ by less than their shares show: the gradient of the lse is the shares all the same."""
    scores = torch.tensor(scores).reshape(1, 1, 1, -1).requires_grad_()
    _, lse = softmax_with_lse(scores, torch.ones(1, 1, 2, 1))
    (grad,) = torch.autograd.grad(lse.sum(), scores)
    torch.testing.assert_close(grad, scores.softmax(dim=-1))
