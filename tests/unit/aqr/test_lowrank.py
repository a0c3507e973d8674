"""The low-rank comparison: exact at full energy, and honest about what a smaller rank leaves."""

import re
import warnings

import numpy as np
import pytest
import torch

from cmt_aqr.aqr.lowrank import LowRankFactors, factored_attention, factorise, make_lowrank_attend, rank_of_energy
from cmt_aqr.attention import AttentionBias
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.unit.attention.cases import (
    BOTH,
    attention_by_loops,
    bias_by_loops,
    random_bias,
    random_qkv,
    random_windows,
    sized,
)

WARNING = re.compile(
    r"^low-rank attention bias: ([\d.]+) % of its energy needs rank (\d+) of (\d+); "
    r"largest error (\S+), relative Frobenius error (\S+)$"
)


@pytest.fixture
def bias():
    return random_bias(random_windows(BOTH, queries=20))


def lowrank_attention(q, k, v, bias, **options):
    """The backend, as the router makes it, called once."""
    return make_lowrank_attend(bias, **options)(q, k, v)


def call(function, *args, **options):
    """The result of a call and the numbers of its warning; exactly one is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **options)
    assert [w.category for w in caught] == [UserWarning]
    match = WARNING.match(str(caught[0].message))
    assert match, str(caught[0].message)
    return result, match.groups()


def energies(bias):
    """Share of the energy (B, Q + 1) that ranks 0, 1, ... keep, by numpy."""
    squares = np.linalg.svd(bias_by_loops(bias).numpy(), compute_uv=False) ** 2
    kept = np.concatenate((np.zeros((len(squares), 1)), squares.cumsum(axis=1)), axis=1)
    return kept / squares.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("head_dim", (3, 8))
def test_full_energy_equals_dense(bias, head_dim):
    q, k, v = random_qkv(bias.windows, dim=head_dim)
    (out, lse), _ = call(lowrank_attention, q, k, v, bias, energy=1.0)
    expected, expected_lse = dense_attention(q, k, v, bias)
    assert (out - expected).abs().max() < 1e-10
    assert (lse - expected_lse).abs().max() < 1e-10


def test_a_cut_bias_is_the_one_that_acts(bias):
    q, k, v = random_qkv(bias.windows)
    factors, _ = call(factorise, bias, 0.7)
    expected = attention_by_loops(q, k, v, factors.left @ factors.right.mT)
    (out, lse), _ = call(lowrank_attention, q, k, v, bias, energy=0.7)
    assert (out - expected[0]).abs().max() < 1e-12
    assert (lse - expected[1]).abs().max() < 1e-12
    assert (out - dense_attention(q, k, v, bias)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("energy", (0.3, 0.9, 0.999))
def test_the_residual_is_what_the_factors_report(bias, energy):
    factors, words = call(factorise, bias, energy)
    exact = bias_by_loops(bias)
    residual = exact - factors.left @ factors.right.mT
    assert factors.max_error == pytest.approx(residual.abs().max().item(), rel=1e-12)
    assert factors.relative_error == pytest.approx((residual.norm() / exact.norm()).item(), rel=1e-12)
    # The best approximation of a rank leaves the energy that is not kept.
    kept, norms = energies(bias)[:, factors.rank], exact.square().sum(dim=(1, 2)).numpy()
    assert factors.relative_error**2 == pytest.approx(((1 - kept) * norms).sum() / norms.sum(), rel=1e-9)
    assert 0 < factors.relative_error**2 <= 1 - energy
    assert words[:3] == (f"{100 * energy:g}", str(factors.rank), "20")
    assert float(words[3]) == pytest.approx(factors.max_error, rel=1e-2)
    assert float(words[4]) == pytest.approx(factors.relative_error, rel=1e-2)


@pytest.mark.parametrize("energy", (0.6, 0.9, 0.999))
def test_rank_is_the_smallest_for_the_worst_sample(bias, energy):
    values = bias.values.clone()
    values[0, 2:] = 0  # two queries: at most four singular values
    bias = AttentionBias(bias.windows, values)
    kept = energies(bias)
    ranks = [int((kept[sample] >= energy).argmax()) for sample in range(2)]
    factors, _ = call(factorise, bias, energy)
    assert ranks[0] < ranks[1] == factors.rank
    assert factors.left.shape == (2, 20, ranks[1]) and factors.right.shape == (2, BOTH.num_tokens, ranks[1])


def test_default_energy_is_90_percent(bias):
    _, words = call(factorise, bias)
    _, of_attention = call(lowrank_attention, *random_qkv(bias.windows), bias)
    assert words == of_attention and words[0] == "90"
    assert int(words[1]) == (energies(bias).min(axis=0) >= 0.9).argmax()


def test_rank_of_energy_by_hand():
    singular = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    first, second = singular[:1], singular[1:]
    found = [rank_of_energy(first, energy, longest_side=4) for energy in (0.5, 0.7, 0.83, 0.84, 1.0)]
    assert found == [1, 2, 2, 3, 3]
    assert [rank_of_energy(second, energy, longest_side=4) for energy in (0.2, 0.5, 0.51, 1.0)] == [1, 2, 3, 4]
    assert rank_of_energy(singular, 0.5, longest_side=4) == 2
    # A small singular value counts at full energy, a rounding error does not.
    faint = torch.tensor([[1.0, 1e-9, 1e-17]], dtype=torch.float64)
    assert rank_of_energy(faint, 1.0, longest_side=4) == 2


def test_a_bias_over_whole_grids_has_rank_two():
    windows = random_windows(BOTH, sized(5, 8, is_local=False), queries=20)
    factors, _ = call(factorise, random_bias(windows), 1.0)
    assert factors.rank == 2 and factors.max_error < 1e-12


def test_a_bias_of_zeros_has_rank_zero():
    windows = random_windows(BOTH)
    bias = AttentionBias(windows, torch.zeros(2, 9, 2, dtype=torch.float64))
    q, k, v = random_qkv(windows)
    factors, _ = call(factorise, bias)
    assert (factors.rank, factors.max_error, factors.relative_error) == (0, 0.0, 0.0)
    out, lse = factored_attention(q, k, v, factors)
    expected, expected_lse = dense_attention(q, k, v, None)
    assert (out - expected).abs().max() < 1e-12 and (lse - expected_lse).abs().max() < 1e-12


def test_factors_serve_several_layers_without_another_warning(bias):
    factors, _ = call(factorise, bias, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (5, 6):
            q, k, v = random_qkv(bias.windows, seed=seed)
            out, _ = factored_attention(q, k, v, factors)
            assert (out - dense_attention(q, k, v, bias)[0]).abs().max() < 1e-10


def test_token_mask_and_rows_without_a_token(bias):
    q, k, v = random_qkv(bias.windows)
    mask = torch.rand(2, BOTH.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1] = False
    (out, lse), _ = call(lowrank_attention, q, k, v, bias, energy=1.0, token_mask=mask)
    expected, expected_lse = dense_attention(q, k, v, bias, token_mask=mask)
    assert (out - expected).abs().max() < 1e-10
    assert torch.equal(out[1], torch.zeros_like(out[1])) and (lse[1] == -torch.inf).all()
    assert (lse[0] - expected_lse[0]).abs().max() < 1e-10


def test_kernels_that_give_nan_for_a_row_without_a_token(bias, monkeypatch):
    real = torch.nn.functional.scaled_dot_product_attention

    def nan_for_empty_rows(q, k, v, *, attn_mask, scale):
        out = real(q, k, v, attn_mask=attn_mask, scale=scale)
        return torch.where(attn_mask.any(dim=-1, keepdim=True), out, torch.nan)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", nan_for_empty_rows)
    mask = torch.ones(2, BOTH.num_tokens, dtype=torch.bool)
    mask[1] = False
    (out, _), _ = call(lowrank_attention, *random_qkv(bias.windows), bias, token_mask=mask)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and out[0].isfinite().all()


def test_the_warning_names_the_line_that_called(bias):
    with pytest.warns(UserWarning, match=WARNING) as caught:
        factorise(bias)
    assert [w.filename for w in caught] == [__file__]


def test_the_chunk_of_the_lse_changes_nothing(bias):
    q, k, v = random_qkv(bias.windows)
    factors, _ = call(factorise, bias)
    lses = [factored_attention(q, k, v, factors, query_chunk=chunk)[1] for chunk in (1, 7, 256)]
    assert all((lse - lses[0]).abs().max() < 1e-13 for lse in lses)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtypes(bias, dtype):
    q, k, v = (x.to(dtype) for x in random_qkv(bias.windows))
    low = AttentionBias(bias.windows, bias.values.to(dtype))
    (out, lse), _ = call(lowrank_attention, q, k, v, low, energy=1.0)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact = AttentionBias(low.windows, low.values.double())
    expected, expected_lse = dense_attention(q.double(), k.double(), v.double(), exact)
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (out - expected).abs().max() < limit and (lse - expected_lse).abs().max() < limit


def test_gradients_reach_q_k_v_and_not_the_values(bias):
    q, k, v = (x.requires_grad_() for x in random_qkv(bias.windows))
    values = bias.values.clone().requires_grad_()
    (out, lse), _ = call(lowrank_attention, q, k, v, AttentionBias(bias.windows, values), energy=1.0)
    found = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    out, lse = dense_attention(q, k, v, bias)
    expected = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    assert all((ours - theirs).abs().max() < 1e-10 for ours, theirs in zip(found, expected, strict=True))
    assert not call(factorise, AttentionBias(bias.windows, values))[0].left.requires_grad


@pytest.mark.parametrize("energy", (0.0, -0.1, 1.01, float("nan")))
def test_a_bad_energy_is_refused(bias, energy):
    with pytest.raises(ValueError, match=rf"^energy must be in \(0, 1\], got {energy}$"):
        factorise(bias, energy)


def test_channels_are_a_multiple_of_eight(bias, monkeypatch):
    seen = []

    def record(q, k, v, **options):
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return v[:, :, : q.shape[2]]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    q, k, v = random_qkv(bias.windows, dim=4)
    for rank in (1, 4, 5):
        factors = LowRankFactors(torch.ones(2, 20, rank), torch.ones(2, BOTH.num_tokens, rank), 0.0, 0.0)
        factored_attention(q, k, v, factors)
    assert seen == [(8, 8, 4), (8, 8, 4), (16, 16, 4)]


def test_windows_apart_from_each_other_need_a_rank_each():
    # Why this is a comparison: the rank grows with the number of windows.
    layout = fusion_layout((12, 12), None)
    windows = random_windows(layout, sized(3, 8), batch=1, queries=9)
    centres = torch.tensor([[0, row, col] for row in (1, 5, 9) for col in (1, 5, 9)])
    windows.cells[0][0, :, 0] = centres
    factors, _ = call(factorise, AttentionBias(windows, torch.ones(1, 9, 1)), 1.0)
    assert factors.rank == 9
