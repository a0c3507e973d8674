"""The projections around an attention function, and the FFN."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_aqr.transformer_layers import Attention, attention_with_dropout, feed_forward, merge_heads, split_heads

DIM, HEADS = 16, 4


def test_heads_split_and_merge_are_inverse():
    x = torch.randn(2, 5, DIM)
    assert split_heads(x, HEADS).shape == (2, HEADS, 5, DIM // HEADS)
    assert torch.equal(merge_heads(split_heads(x, HEADS)), x)


def test_attention_equals_torchs_module():
    torch.manual_seed(0)
    ours = Attention(dim=DIM, num_heads=HEADS).double()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    query, key, value = (torch.randn(2, length, DIM, dtype=torch.float64) for length in (7, 11, 11))
    expected, _ = theirs(query, key, value, need_weights=False)
    actual = ours(query, key, value, F.scaled_dot_product_attention)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_attention_in_single_operations_equals_the_fused_one():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for length in (5, 7, 7))
    mask = torch.rand(5, 7) < 0.6
    for attention_mask in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        actual = attention_with_dropout(q, k, v, attention_mask=attention_mask, dropout=0.0)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_dropout_removes_probabilities_and_keeps_their_mean():
    torch.manual_seed(0)
    q, k, identity = torch.randn(1, 1, 2000, 4), torch.randn(1, 1, 10, 4), torch.eye(10)[None, None]
    exact = attention_with_dropout(q, k, identity, attention_mask=None, dropout=0.0)
    dropped = attention_with_dropout(q, k, identity, attention_mask=None, dropout=0.3)
    is_gone = dropped == 0
    assert is_gone.double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(dropped[~is_gone], exact[~is_gone] / 0.7)
    assert not attention_with_dropout(q, k, identity, attention_mask=None, dropout=1.0).any()


def test_feed_forward_by_hand():
    torch.manual_seed(0)
    ffn = feed_forward(3, 5)
    assert list(ffn.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]  # names in checkpoints
    assert not ffn[0].bias.any() and not ffn[2].bias.any()
    x = torch.randn(2, 4, 3)
    expected = (x @ ffn[0].weight.T).clamp(min=0) @ ffn[2].weight.T
    torch.testing.assert_close(ffn(x), expected)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="got dim 10 and 4 heads"):
        Attention(dim=10, num_heads=4)
