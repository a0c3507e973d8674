"""The decoder against torch's own attention module, its quirks, dropout, and who can influence whom."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_aqr.models.decoder import Decoder, DecoderLayer
from cmt_aqr.models.denoising import denoising_mask
from cmt_aqr.transformer_layers import KEY, VALUE

DIM, HEADS = 16, 4


def make_decoder(**changes):
    torch.manual_seed(0)
    settings = {"dim": DIM, "num_heads": HEADS, "ffn_dim": 24, "num_layers": 3, "dropout": 0.0} | changes
    decoder = Decoder(**settings).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return decoder


def make_inputs(num_queries=7, num_tokens=11):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, num_queries, DIM), (2, num_tokens, DIM), (2, num_tokens, DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def torch_attention(ours):
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    module.load_state_dict(ours.state_dict(), strict=True)
    return module


def test_layers_equal_torchs_attention_module_with_the_shared_norm_outside_the_chain():
    decoder = make_decoder()
    query_positions, tokens, token_positions = make_inputs()
    mask = torch.rand(7, 7) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    actual = decoder(query_positions, tokens, token_positions, attention_mask=mask)

    x = torch.zeros_like(query_positions)
    for index, layer in enumerate(decoder.layers):
        own, cross = torch_attention(layer.self_attention), torch_attention(layer.cross_attention)
        placed = x + query_positions
        x = layer.norms[0](x + own(placed, placed, x, attn_mask=~mask, need_weights=False)[0])
        keys = tokens + token_positions
        x = layer.norms[1](x + cross(x + query_positions, keys, tokens, need_weights=False)[0])
        x = layer.norms[2](x + layer.ffn(x))
        # Quirk Q7: the next layer takes x, not from what is returned.
        torch.testing.assert_close(actual[index], decoder.post_norm(x), rtol=1e-12, atol=1e-12)


def test_cross_attention_goes_through_attend_heads_first():
    decoder = make_decoder()
    query_positions, tokens, token_positions = make_inputs()
    shapes = []

    def attend(q, k, v):
        shapes.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return F.scaled_dot_product_attention(q, k, v)

    actual = decoder(query_positions, tokens, token_positions, attend=attend)
    head = DIM // HEADS
    assert shapes == [((2, HEADS, 7, head), (2, HEADS, 11, head), (2, HEADS, 11, head))] * 3
    assert torch.equal(actual, decoder(query_positions, tokens, token_positions))


def test_the_order_of_the_tokens_does_not_matter():
    decoder = make_decoder()
    query_positions, tokens, token_positions = make_inputs()
    order = torch.randperm(11)
    shuffled = decoder(query_positions, tokens[:, order], token_positions[:, order])
    torch.testing.assert_close(shuffled, decoder(query_positions, tokens, token_positions), rtol=1e-12, atol=1e-12)


def test_attention_dropout_acts_in_self_attention_only_and_only_in_training(monkeypatch):
    # Quirk Q15.
    probabilities = []
    exact = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0):
        probabilities.append(dropout_p)
        return exact(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    decoder = make_decoder(dropout=0.3, num_layers=1)
    inputs = make_inputs()
    decoder.train()(*inputs, attend=spy)
    decoder.eval()(*inputs, attend=spy)
    assert probabilities == [0.3, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("is_recomputed", "compiling", "fused"), [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_compiled_layers_that_are_recomputed_use_no_fused_dropout(monkeypatch, is_recomputed, compiling, fused):
    calls = []

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, exact=F.scaled_dot_product_attention):
        calls.append(dropout_p)
        return exact(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    decoder = make_decoder(dropout=0.3, num_layers=1, checkpoint_layers=is_recomputed).train()
    decoder.layers[0].attend_to_queries(*make_inputs()[:1] * 2, None)
    assert calls == [0.3] * fused


def test_residual_dropout_acts_on_both_attentions():
    layer = DecoderLayer(dim=DIM, num_heads=HEADS, ffn_dim=24, dropout=1.0).double().train()
    query_positions, tokens, token_positions = make_inputs()
    x = torch.randn_like(query_positions)
    # Everything dropped: both attentions contribute nothing.
    k, v = layer.cross_attention.project(KEY, tokens + token_positions), layer.cross_attention.project(VALUE, tokens)
    actual = layer(x, query_positions, k, v, None, F.scaled_dot_product_attention)
    x = layer.norms[1](layer.norms[0](x))
    torch.testing.assert_close(actual, layer.norms[2](x + layer.ffn(x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_keys_and_values_of_all_layers_in_one_product_without_gradients(monkeypatch, dtype, tolerance):
    """In training every layer projects by itself: a backward pass of one product holds all its gradients at once."""
    decoder = make_decoder(num_layers=3).to(dtype).eval()
    inputs = [x.to(dtype) for x in make_inputs()]
    products = []

    def spy(x, weight, bias=None, linear=F.linear):
        products.append((x.shape[1], len(weight)))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    layer_by_layer = decoder(*inputs)
    assert products.count((11, DIM)) == 2 * 3
    products.clear()
    with torch.no_grad():
        at_once = decoder(*inputs)
    assert products.count((11, 3 * DIM)) == 2 and products.count((11, DIM)) == 0
    torch.testing.assert_close(at_once, layer_by_layer.detach(), rtol=tolerance, atol=tolerance)


def test_recomputed_layers_give_the_same_gradients():
    """Dropout is on: the second pass must draw what the first one drew."""
    losses, gradients, passes = [], [], []
    for checkpoint_layers in (False, True):
        decoder = make_decoder(checkpoint_layers=checkpoint_layers, dropout=0.5).train()
        calls = []
        decoder.layers[1].ffn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inputs = make_inputs()
        inputs[1].requires_grad_()
        torch.manual_seed(7)
        loss = decoder(*inputs).square().sum()
        loss.backward()
        losses.append(loss)
        gradients.append([inputs[1].grad, *(p.grad for p in decoder.parameters())])
        passes.append(len(calls))
    assert passes == [1, 2]
    assert torch.equal(*losses)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


def test_no_gradient_flows_between_denoising_groups_or_from_them_to_matching_queries():
    decoder = make_decoder()
    groups, slots, num_dn, num_queries = 2, 3, 8, 4
    mask = denoising_mask(groups, slots, num_dn=num_dn, num_queries=num_queries)
    query_positions, tokens, token_positions = make_inputs(num_dn + num_queries)
    query_positions.requires_grad_()
    output = decoder(query_positions, tokens, token_positions, attention_mask=mask)[-1]
    parts = {"padding": range(2), "group 0": range(2, 5), "group 1": range(5, 8), "matching": range(8, 12)}
    influences = {
        "padding": set(),
        "group 0": {"group 0", "matching"},
        "group 1": {"group 1", "matching"},
        "matching": {"matching"},
    }
    for receiver, rows in parts.items():
        if receiver == "padding":
            continue
        weight = torch.randn(2, len(rows), DIM, dtype=torch.float64)
        (grad,) = torch.autograd.grad((output[:, list(rows)] * weight).sum(), query_positions, retain_graph=True)
        seen = {name for name, sources in parts.items() if grad[:, list(sources)].abs().max() > 0}
        assert seen == influences[receiver]


def test_padding_rows_see_only_themselves_and_stay_finite():
    decoder = make_decoder()
    mask = denoising_mask(0, 0, num_dn=3, num_queries=4)
    query_positions, tokens, token_positions = make_inputs(7)
    output = decoder(query_positions, tokens, token_positions, attention_mask=mask)
    assert output.isfinite().all()
    alone = decoder(query_positions[:, :1], tokens, token_positions)
    torch.testing.assert_close(output[:, :, :1], alone, rtol=1e-12, atol=1e-12)


def test_initialisation_is_xavier_with_zero_biases():
    layer = DecoderLayer(dim=256, num_heads=8, ffn_dim=1024, dropout=0.1)
    for name, parameter in layer.named_parameters():
        if name.startswith("norms"):
            continue
        if parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            limit = (6 / sum(parameter.shape)) ** 0.5
            assert 0.98 * limit < parameter.abs().max() <= limit, name
