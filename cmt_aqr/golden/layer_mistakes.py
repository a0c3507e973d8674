"""Mistakes inside AQR, the decoder and the heads: the layer is computed again from A's inputs, with the mistake.

The functions are as in mistakes.py. They only try the first tensor of a stage that differs, since up to there A's
values are B's. A few queries, the last ones, are enough.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_aqr.attention import AttentionBias
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.geometry import inverse_sigmoid
from cmt_aqr.golden.mistakes import Attempts, Case
from cmt_aqr.golden.rebuild import rebuild_bias, rebuild_generator, rebuild_layer, rebuild_windows, set_eps
from cmt_aqr.models.decoder import DecoderLayer
from cmt_aqr.transformer_layers import KEY, QUERY, VALUE, Attend, merge_heads

ROWS = slice(-64, None)
# Other programs' defaults for layer norm.
EPS = {1e-6: "1e-6", 1e-12: "1e-12", 1e-3: "1e-3"}
TOKENS = ("queries/positions", "tokens/values", "tokens/positions")
NO_SCALE = "the scores were not divided by sqrt(D), D = hidden_dim / num_heads, before the softmax"
WHOLE_SCALE = "the scores were divided by sqrt(hidden_dim), they are divided by sqrt(D), D = hidden_dim / num_heads"
BARE_KEYS = "the keys have no position embeddings: keys are tokens + positions, values the tokens alone"
BARE_QUERIES = "the queries have no position embeddings: the attention's query is x + queries/positions"
PLACED_VALUES = "the values have position embeddings: keys are tokens + positions, values the tokens alone"
LATE_RESIDUAL = "the norm was taken before the residual sum: the layers are post-norm, norm(x + f(x))"
PRE_NORM = "pre-norm, x + f(norm(x)): the layers are post-norm, norm(x + f(x))"


def eps_words(eps: float) -> str:
    """The sentence about a wrong eps of the layer norms."""
    return f"the layer norms have an eps of {EPS[eps]}; in the decoder and the weight generator it is 1e-5"


def generator(case: Case) -> Attempts:
    """The weights of AQR from other windows, or by a generator with a mistake."""
    windows = tuple(f"windows/{grid['name']}" for grid in case.constants.get("grids", []))
    if not case.is_first or case.left.shape != case.right.shape or not case.has(*TOKENS, *windows):
        return
    module, place = rebuild_generator(case.a), rebuild_windows(case.a, ROWS)
    queries, values, positions = (case.a[name].double() for name in TOKENS)
    queries, right = queries[:, ROWS], case.right[:, ROWS]
    for words, radii in other_radii({grid.name: place.settings.radius(grid) for grid in place.layout.grids}):
        yield words, module(queries, values, positions, rebuild_windows(case.a, ROWS, radii)), right
    no_positions = torch.zeros_like(positions)
    yield f"weight generator: {BARE_KEYS}", module(queries, values, no_positions, place), right
    yield f"weight generator: {BARE_QUERIES}", module(torch.zeros_like(queries), values, positions, place), right
    for eps in EPS:
        set_eps(module, eps)
        yield eps_words(eps), module(queries, values, positions, place), right
    for words, factor in other_scales(case):
        module = rebuild_generator(case.a)
        for layer in module.layers:
            layer.attention.in_proj_weight[: queries.shape[-1]] *= factor
            layer.attention.in_proj_bias[: queries.shape[-1]] *= factor
        yield f"weight generator: {words}", module(queries, values, positions, place), right


def other_radii(radii: dict[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Windows that reach one cell less or more than they should, in one grid or in all."""
    for change, how in ((-1, "one cell less"), (1, "one cell more")):
        for names in [[name] for name in radii] + [list(radii)] * (len(radii) > 1):
            if all(radii[name] + change >= 0 for name in names):
                who = " and ".join(names)
                words = f"window radius: it is size // 2 cells to every side, windows of {who} reach {how}"
                yield words, {name: radius + change * (name in names) for name, radius in radii.items()}


def other_scales(case: Case) -> Iterator[tuple[str, float]]:
    """Factors on the queries that undo or change the division of the scores by sqrt(D)."""
    dim, heads = case.constants["hidden_dim"], case.constants["num_heads"]
    yield NO_SCALE, math.sqrt(dim / heads)
    if heads > 1:
        yield WHOLE_SCALE, math.sqrt(1 / heads)


def decoder_layer(case: Case) -> Attempts:
    """A decoder layer's tensors with a mistake in self-attention, cross-attention or FFN."""
    number, _, part = case.name.removeprefix("decoder/layer").partition(".")
    steps = {"self": self_attention, "lse": cross_attention, "cross": cross_attention, "output": feed_forward}
    if not case.is_first or part not in steps or not number.isdecimal() or case.left.shape != case.right.shape:
        return
    name = f"decoder/layer{number}"
    needed = {
        "self": (f"decoder/layer{int(number) - 1}.output",) if int(number) else (),
        "output": (f"{name}.cross",),
    }.get(part, (f"{name}.self",))
    if not case.has(*TOKENS, *needed):
        return
    before = case.a[needed[0]].double() if needed else torch.zeros_like(case.a["queries/positions"].double())
    yield from steps[part](case, int(number), before)


def self_attention(case: Case, number: int, x: Tensor) -> Attempts:
    """After self-attention and norm."""
    positions, mask = case.a["queries/positions"].double(), None
    if case.has("denoising/attention_mask"):
        mask = case.a["denoising/attention_mask"]
        words = "the denoising mask was not applied to the self-attention"
        yield words, rebuild_layer(case.a, number).attend_to_queries(x, positions, None), case.right
    for words, layer in other_norms(case, number):
        yield words, layer.attend_to_queries(x, positions, mask), case.right

    def attend(factor: float) -> Attend:
        return lambda q, k, v: F.scaled_dot_product_attention(q * factor, k, v, attn_mask=mask)

    layer, placed = rebuild_layer(case.a, number), x + positions
    for words, factor in other_scales(case):
        yield words, layer.norms[0](x + layer.self_attention(placed, placed, x, attend(factor))), case.right
    yield PLACED_VALUES, layer.norms[0](x + layer.self_attention(placed, placed, placed, attend(1))), case.right
    yield LATE_RESIDUAL, x + layer.norms[0](layer.self_attention(placed, placed, x, attend(1))), case.right
    normal = layer.norms[0](x)
    placed = normal + positions
    yield PRE_NORM, x + layer.self_attention(placed, placed, normal, attend(1)), case.right


def cross_attention(case: Case, number: int, x: Tensor) -> Attempts:
    """The lse of the cross-attention, or the output after it and its norm."""
    p, tokens, e = (case.a[name].double() for name in TOKENS)
    tokens = case.a["aqr/tokens"].double() if case.has("aqr/tokens") else tokens
    x, p = x[:, ROWS], p[:, ROWS]
    bias, layer = rebuild_bias(case.a, ROWS), rebuild_layer(case.a, number)
    attention, norm = layer.cross_attention, layer.norms[1]
    k, v = attention.project(KEY, tokens + e), attention.project(VALUE, tokens)
    is_lse = case.name.endswith(".lse")
    right = case.right[:, :, ROWS] if is_lse else case.right[:, ROWS]

    def attend(asking: Tensor, k: Tensor, v: Tensor, bias: AttentionBias | None, factor: float = 1) -> tuple:
        out, lse = dense_attention(factor * attention.project(QUERY, asking), k, v, bias)
        return attention.out_proj(merge_heads(out)), lse

    def outcome(*arguments) -> Tensor:
        out, lse = attend(*arguments)
        return lse if is_lse else norm(x + out)

    yield BARE_QUERIES, outcome(x, k, v, bias), right
    yield BARE_KEYS, outcome(x + p, attention.project(KEY, tokens), v, bias), right
    for words, factor in other_scales(case):
        yield words, outcome(x + p, k, v, bias, factor), right
    for words, other in other_biases(case, bias):
        yield words, outcome(x + p, k, v, other), right
    out, lse = attend(norm(x) + p, k, v, bias)
    yield PRE_NORM, lse if is_lse else x + out, right
    if not is_lse:
        yield PLACED_VALUES, outcome(x + p, k, attention.project(VALUE, tokens + e), bias), right
        out, _ = attend(x + p, k, v, bias)
        yield LATE_RESIDUAL, x + norm(out), right
        for words, other in other_norms(case, number):
            yield words, other.norms[1](x + out), right


def other_biases(case: Case, bias: AttentionBias | None) -> Iterator[tuple[str, AttentionBias | None]]:
    """No bias, and one that was divided with the scores."""
    if bias is None:
        return
    yield "the cross-attention has no bias: it belongs to all decoder layers", None
    share = math.sqrt(case.constants["num_heads"] / case.constants["hidden_dim"])
    divided = replace(bias, values=bias.values * share)
    yield "the bias was added before the division by sqrt(D): it is added after it", divided


def feed_forward(case: Case, number: int, x: Tensor) -> Attempts:
    """After the FFN and norm."""
    for words, layer in other_norms(case, number):
        yield words, layer.transform(x), case.right
    layer = rebuild_layer(case.a, number)
    norm, first, last = layer.norms[2], layer.ffn[0], layer.ffn[2]
    yield LATE_RESIDUAL, x + norm(layer.ffn(x)), case.right
    yield PRE_NORM, x + layer.ffn(norm(x)), case.right
    yield "the FFN has GELU, not ReLU", norm(x + last(F.gelu(first(x)))), case.right


def other_norms(case: Case, number: int) -> Iterator[tuple[str, DecoderLayer]]:
    """The layer with another eps in its norms."""
    for eps in EPS:
        layer = rebuild_layer(case.a, number)
        set_eps(layer, eps)
        yield eps_words(eps), layer


def reference(case: Case) -> Attempts:
    """Centre and height of the heads, with the reference point added in a wrong way or not at all."""
    if not case.has("queries/reference_points") or case.left.shape != case.right.shape:
        return
    axes = slice(0, 2) if case.name.endswith(".center") else slice(2, 3)
    low, high = (x[axes] for x in torch.tensor(case.constants["point_range"], dtype=torch.float64).chunk(2))
    points = case.a["queries/reference_points"].double()
    raw = (((case.left.double() - low) / (high - low)).logit()) - inverse_sigmoid(points)[..., axes]
    attempts: dict[str, Callable[[], Tensor]] = {
        "the reference point was added without its inverse sigmoid: sigmoid(raw + inverse_sigmoid(r))": lambda: (
            raw + points[..., axes]
        ).sigmoid(),
        "the reference point was not added: sigmoid(raw + inverse_sigmoid(r))": raw.sigmoid,
        "raw output was added to the reference point: sigmoid(raw + inverse_sigmoid(r))": lambda: (
            raw + points[..., axes]
        ),
        "the sigmoid is missing: sigmoid(raw + inverse_sigmoid(r)) over the point range": lambda: (
            raw + inverse_sigmoid(points)[..., axes]
        ),
    }
    for words, attempt in attempts.items():
        yield words, attempt() * (high - low) + low, case.right
    if axes == slice(0, 2):
        swapped = inverse_sigmoid(points)[..., [1, 0]]
        yield "y of the reference point was added to x", (raw + swapped).sigmoid() * (high - low) + low, case.right
