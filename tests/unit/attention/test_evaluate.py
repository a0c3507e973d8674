"""The way in: attend and make_attend, and what they refuse."""

import pytest
import torch

from cmt_aqr.attention import attend, make_attend
from cmt_aqr.attention.dense import dense_attention
from tests.unit.attention.cases import BOTH, random_bias, random_qkv, random_windows

NUM_TOKENS = BOTH.num_tokens


@pytest.fixture
def bias():
    return random_bias(random_windows(BOTH))


def test_dense_backend_is_the_dense_evaluator(bias):
    q, k, v = random_qkv(bias.windows)
    mask = torch.arange(NUM_TOKENS).expand(2, -1) % 3 > 0
    for token_mask in (None, mask):
        expected = dense_attention(q, k, v, bias, token_mask=token_mask)
        found = attend(q, k, v, bias, backend="dense", token_mask=token_mask)
        shared = make_attend(bias, backend="dense", token_mask=token_mask)(q, k, v)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(shared, expected, strict=True))


def test_one_bias_serves_several_layers(bias):
    evaluate = make_attend(bias, backend="dense")
    for seed in (3, 4):
        q, k, v = random_qkv(bias.windows, seed=seed)
        assert torch.equal(evaluate(q, k, v)[0], attend(q, k, v, bias, backend="dense")[0])


def test_gradients_reach_everything(bias):
    leaves = [x.requires_grad_() for x in random_qkv(bias.windows)]
    bias.values.requires_grad_()
    out, lse = attend(*leaves, bias, backend="dense")
    (out.square().sum() + lse.sum()).backward()
    assert all(x.grad.abs().max() > 1e-3 for x in (*leaves, bias.values))


BAD = {
    "q without heads": ({"q": (2, 9, 4)}, r"q must have shape \(2, M, 9, D\) to fit the bias, got \(2, 9, 4\)"),
    "another batch": ({"q": (1, 2, 9, 4)}, r"q must have shape \(2, M, 9, D\) to fit the bias, got \(1, 2, 9, 4\)"),
    "a query too many": (
        {"q": (2, 2, 10, 4)},
        r"q must have shape \(2, M, 9, D\) to fit the bias, got \(2, 2, 10, 4\)",
    ),
    "a token too few": (
        {"k": (2, 2, NUM_TOKENS - 1, 4)},
        rf"k must have shape \(2, 2, {NUM_TOKENS}, 4\) to fit q and the token layout, got \(2, 2, {NUM_TOKENS - 1}, ",
    ),
    "other heads": ({"v": (2, 1, NUM_TOKENS, 4)}, rf"v must have shape \(2, 2, {NUM_TOKENS}, 4\) to fit q"),
    "other channels": ({"v": (2, 2, NUM_TOKENS, 3)}, rf"v must have shape \(2, 2, {NUM_TOKENS}, 4\) to fit q"),
    "mask of queries": (
        {"mask": (2, 9)},
        rf"token_mask must be bool of shape \(2, {NUM_TOKENS}\), got torch.bool \(2, 9\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes(bias, name):
    change, message = BAD[name]
    token_shape = (2, 2, NUM_TOKENS, 4)
    shapes = {"q": (2, 2, 9, 4), "k": token_shape, "v": token_shape, "mask": (2, NUM_TOKENS)} | change
    q, k, v = (torch.zeros(shapes[x], dtype=torch.float64) for x in "qkv")
    mask = torch.ones(shapes["mask"], dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, bias, backend="dense", token_mask=mask)
    with pytest.raises(ValueError, match=message):
        make_attend(bias, backend="dense", token_mask=mask)(q, k, v)


def test_a_mask_of_numbers_is_refused(bias):
    mask = torch.zeros(2, NUM_TOKENS)
    with pytest.raises(ValueError, match=rf"bool of shape \(2, {NUM_TOKENS}\), got torch.float32 \(2, {NUM_TOKENS}\)"):
        attend(*random_qkv(bias.windows), bias, backend="dense", token_mask=mask)


def test_tensors_of_different_dtypes_are_refused(bias):
    q, k, v = random_qkv(bias.windows)
    with pytest.raises(ValueError, match=r"^k must be torch.float32 on cpu like q, got torch.float64 on cpu$"):
        attend(q.float(), k.double(), v.float(), bias, backend="dense")
