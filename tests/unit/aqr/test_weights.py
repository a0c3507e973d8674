"""The weight generator: gathered attention against dense masked attention, what it may look at, where it starts."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmt_aqr.aqr.weights import WeightGenerator, window_attention
from cmt_aqr.aqr.window_tokens import all_window_tokens
from cmt_aqr.tools.attention_cases import fusion_layout
from cmt_aqr.transformer_layers import Attention
from tests.unit.attention.cases import LAYOUTS, inside_by_loops, random_qkv, random_windows, sized

DIM, HEADS = 12, 3
ALL_CAMERAS = sized(2, 3, camera_assignment="all")


def make_generator(*, num_layers=2, num_grids=2, activation="tanh", neutral=0.0, seed=0):
    """Norms and biases are random too, so that nothing is hidden by a zero or a one; weights of some size."""
    torch.manual_seed(seed)
    generator = WeightGenerator(
        dim=DIM,
        num_heads=HEADS,
        ffn_dim=20,
        num_layers=num_layers,
        num_grids=num_grids,
        activation=activation,
        neutral=neutral,
    ).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return generator


def make_inputs(windows, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, queries = windows.batch_and_queries
    lengths = (queries, windows.layout.num_tokens, windows.layout.num_tokens)
    return [torch.randn(batch, n, DIM, generator=generator, dtype=torch.float64) for n in lengths]


def dense_masked(q, k, v, inside):
    """softmax over the tokens inside only, the whole [Q x K] written out; 0 for a row without any."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~inside[:, None], -math.inf).softmax(-1)
    return weights.nan_to_num(0.0) @ v


@pytest.mark.parametrize("settings", (sized(3, 4), ALL_CAMERAS), ids=("first", "all"))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gathered_attention_equals_dense_masked_attention(layout, settings):
    windows = random_windows(layout, settings)
    inside = inside_by_loops(windows)
    tokens, is_valid = all_window_tokens(windows)
    upstream = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    results = []
    for attention in (
        lambda q, k, v: window_attention(q, k, v, tokens, is_valid),
        lambda q, k, v: dense_masked(q, k, v, inside),
    ):
        inputs = [x.requires_grad_() for x in random_qkv(windows)]
        out = attention(*inputs)
        (out * upstream).sum().backward()
        results.append((out, *(x.grad for x in inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert results[0][2].abs().max() > 0.01


def test_gradients_by_finite_differences():
    windows = random_windows(fusion_layout((2, 3), (1, 2, 2)), sized(3, 2), batch=1, queries=3)
    q, k, v = (x.requires_grad_() for x in random_qkv(windows, heads=1, dim=2))
    tokens, is_valid = all_window_tokens(windows)
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, tokens, is_valid), (q, k, v))


def test_a_query_without_tokens_gets_zero_and_gives_no_gradient():
    windows = random_windows(LAYOUTS["camera"], queries=4)
    tokens, is_valid = all_window_tokens(windows)
    is_valid = is_valid.clone()
    is_valid[:, 1] = False
    inputs = [x.requires_grad_() for x in random_qkv(windows)]
    out = window_attention(*inputs, tokens, is_valid)
    assert not out[:, :, 1].any() and out[0, 0].any()
    out[:, :, 1].sum().backward()
    assert not any(x.grad.any() for x in inputs)  # NaN would count as any


def test_projections_equal_torchs_attention_module():
    windows = random_windows(LAYOUTS["both"])
    tokens, is_valid = all_window_tokens(windows)
    torch.manual_seed(0)
    ours = Attention(dim=DIM, num_heads=HEADS).double()
    nn.init.normal_(ours.in_proj_bias)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    query, key, value = make_inputs(windows)
    mask = ~inside_by_loops(windows).repeat_interleave(HEADS, dim=0)
    expected = theirs(query, key, value, attn_mask=mask, need_weights=False)[0]
    actual = ours(query, key, value, lambda q, k, v: window_attention(q, k, v, tokens, is_valid))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ("tanh", "sigmoid"))
@pytest.mark.parametrize(("layout", "num_grids"), (("both", 2), ("three", 3)))
def test_the_generator_layer_by_layer(activation, layout, num_grids):
    windows = random_windows(LAYOUTS[layout])
    generator = make_generator(num_layers=2, num_grids=num_grids, activation=activation)
    positions, tokens, token_positions = make_inputs(windows)
    mask = ~inside_by_loops(windows).repeat_interleave(HEADS, dim=0)
    x = torch.zeros_like(positions)
    for layer in generator.layers:
        theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
        theirs.load_state_dict(layer.attention.state_dict(), strict=True)
        seen = theirs(x + positions, tokens + token_positions, tokens, attn_mask=mask, need_weights=False)[0]
        x = layer.norms[0](x + seen)
        x = layer.norms[1](x + layer.ffn(x))
    logits = x @ generator.linear.weight.T + generator.linear.bias
    expected = torch.tanh(logits) if activation == "tanh" else 1 / (1 + torch.exp(-logits))
    actual = generator(positions, tokens, token_positions, windows)
    assert actual.shape == (2, 9, num_grids)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_query_attends_to_the_tokens_of_its_windows_alone():
    windows = random_windows(LAYOUTS["both"])
    inside = inside_by_loops(windows)
    generator = make_generator()
    positions, tokens, token_positions = make_inputs(windows)
    tokens.requires_grad_()
    weights = generator(positions, tokens, token_positions, windows)
    for query in range(9):
        (grad,) = torch.autograd.grad(weights[:, query].sum(), tokens, retain_graph=True)
        assert torch.equal(grad.abs().amax(-1) > 0, inside[:, query])


def test_the_generator_looks_through_its_windows_also_where_the_bias_is_not_local():
    local = random_windows(LAYOUTS["both"], sized(3, 4))
    spread = random_windows(LAYOUTS["both"], sized(3, 4, is_local=False))
    generator, inputs = make_generator(), make_inputs(local)
    assert torch.equal(generator(*inputs, local), generator(*inputs, spread))


@pytest.mark.parametrize(("activation", "low"), (("tanh", -1.0), ("sigmoid", 0.0)))
def test_weights_fill_their_range(activation, low):
    windows = random_windows(LAYOUTS["both"], queries=200)
    generator = make_generator(activation=activation)
    with torch.no_grad():
        generator.linear.weight *= 20
    weights = generator(*make_inputs(windows), windows)
    assert low <= weights.min() < low + 0.01 and 0.99 < weights.max() <= 1.0


@pytest.mark.parametrize(
    ("activation", "neutral", "start"), (("tanh", 0.0, 0.0), ("sigmoid", 0.0, 0.05), ("sigmoid", 1.0, 0.95))
)
def test_a_fresh_generator_changes_nearly_nothing_and_all_of_it_learns(activation, neutral, start):
    windows = random_windows(LAYOUTS["both"], queries=200)
    torch.manual_seed(0)
    generator = WeightGenerator(
        dim=DIM, num_heads=HEADS, ffn_dim=20, num_layers=2, num_grids=2, activation=activation, neutral=neutral
    ).double()
    weights = generator(*make_inputs(windows), windows)
    assert (weights - start).abs().max() < 0.1
    assert 0.0002 < weights.std() < 0.03  # not all the same
    weights.sum().backward()
    for name, parameter in generator.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest > 1e-7, name
    assert not generator.layers[0].attention.out_proj.bias.any()


def test_weights_of_autocast_are_float32_and_close():
    windows = random_windows(LAYOUTS["both"])
    generator = make_generator().float()
    inputs = [x.float() for x in make_inputs(windows)]
    exact = generator(*inputs, windows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = generator(*inputs, windows)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    assert not torch.equal(rounded, exact)


def test_one_graph_with_the_same_numbers():
    generator = make_generator()
    torch._dynamo.reset()
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            windows = random_windows(LAYOUTS["both"], seed=seed)
            inputs = make_inputs(windows, seed=seed)
            torch.testing.assert_close(compiled(*inputs, windows), generator(*inputs, windows), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_nothing_of_queries_by_tokens_exists():
    layout = fusion_layout((64, 64), (2, 16, 16))
    windows = random_windows(layout, sized(3, 3), batch=1, queries=60)
    generator, inputs = make_generator(num_layers=1), make_inputs(windows)
    with LargestTensor() as largest:
        generator(*[x.requires_grad_() for x in inputs], windows).sum().backward()
    assert 60 * 18 * DIM <= largest.numel <= layout.num_tokens * DIM
    assert largest.numel < 60 * layout.num_tokens


def test_bad_settings():
    with pytest.raises(ValueError, match=r"neutral weight of 0, got 1\.0"):
        make_generator(activation="tanh", neutral=1.0)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"^the activation of the weights must be tanh or sigmoid, got 'relu'$"):
        make_generator(activation="relu")
