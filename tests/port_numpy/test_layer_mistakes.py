"""Every mistake that the comparison looks for inside AQR, decoder and heads is found when the port makes it."""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmt_aqr.golden.__main__ import main
from tests.port_numpy import aqr, decoder, port
from tests.port_numpy import model as layers
from tests.port_numpy.model import Model
from tests.unit.golden.make_tiny import FOLDER

HEAD_DIM, DIM = 8, 16


def given_other(module, function, **changes):
    """A patch: the function of a module sees other tensors, which the rest of the port does not."""

    def patch(monkeypatch):
        original = getattr(module, function)

        def run(*arguments):
            made = arguments[-1]
            seen = {**made, **{name.replace("__", "/"): change(made) for name, change in changes.items()}}
            result = original(*arguments[:-1], seen)
            made.update({name: x for name, x in seen.items() if name not in made})
            return result

        monkeypatch.setattr(port, function, run)

    return patch


def zeros(name):
    return lambda made: np.zeros_like(made[name])


def projected(name, factor):
    """A patch: the queries of the attentions with this name are multiplied by a factor, so the scores are."""

    def patch(monkeypatch):
        original = Model.project

        def project(self, attention, part, x):
            return original(self, attention, part, x) * (factor if name in attention and part == 0 else 1)

        monkeypatch.setattr(Model, "project", project)

    return patch


def attending(name, change):
    """A patch: ``change`` of an attention's inputs and of what is added to its scores."""

    def patch(monkeypatch):
        original = decoder.attention

        def attention(model, own, inputs, added):
            return original(model, own, *(change(model, own, inputs, added) if name in own else (inputs, added)))

        monkeypatch.setattr(decoder, "attention", attention)

    return patch


def pre_norm(name, norm):
    """A patch: x + f(norm(x)) in place of norm(x + f(x))."""

    def patch(monkeypatch):
        add, mlp, attend = decoder.add_and_norm, Model.mlp, decoder.attention
        positions = {}

        def attention(model, own, inputs, added):
            p = positions.setdefault("queries", inputs[0])  # x is 0 in the first layer
            if name in own:
                x = inputs[0] - p
                y = model.norm(norm, x)
                keys, values = (inputs[1], inputs[2]) if "cross" in own else (y + p, y)
                inputs = (y + p, keys, values)
            return attend(model, own, inputs, added)

        monkeypatch.setattr(decoder, "add_and_norm", lambda m, own, x, y: x + y if own == norm else add(m, own, x, y))
        monkeypatch.setattr(Model, "mlp", lambda m, own, x: mlp(m, own, m.norm(norm, x) if name in own else x))
        monkeypatch.setattr(decoder, "attention", attention)

    return patch


def late_residual(norm):
    """A patch: x + norm(f(x))."""

    def patch(monkeypatch):
        add = decoder.add_and_norm
        monkeypatch.setattr(
            decoder, "add_and_norm", lambda m, own, x, y: x + m.norm(norm, y) if own == norm else add(m, own, x, y)
        )

    return patch


def constant(name, value):
    """A patch of a setting."""

    def patch(monkeypatch):
        original = Model.__init__

        def init(self, *arguments):
            original(self, *arguments)
            self.constants[name] = value

        monkeypatch.setattr(Model, "__init__", init)

    return patch


def eps(value):
    return lambda monkeypatch: monkeypatch.setattr(layers, "DECODER_EPS", value)


def functions(**replaced):
    """A patch of functions that the decoder's file uses."""

    def patch(monkeypatch):
        for name, function in replaced.items():
            monkeypatch.setattr(decoder, name, function)

    return patch


def gelu(monkeypatch):
    def mlp(self, name, x):
        y = self.linear(f"{name}.0", x)
        erf = np.vectorize(math.erf)
        y = y * (1 + erf(y / math.sqrt(2))) / 2 if "ffn" in name and "decoder" in name else np.maximum(y, 0)
        return self.linear(f"{name}.2", y)

    monkeypatch.setattr(Model, "mlp", mlp)


def wide_windows(monkeypatch):
    radius = aqr.radius
    monkeypatch.setattr(aqr, "radius", lambda model, grid: radius(model, grid) + (grid["name"] == "lidar"))


def same(x):
    return x


GENERATOR, LAYER0, LAYER1 = "aqr.generator.layers.0", "decoder.layers.0", "decoder.layers.1"
POINTS = "queries/reference_points"
NO_SCALE = "the scores were not divided by sqrt(D)"
WHOLE_SCALE = "the scores were divided by sqrt(hidden_dim)"
# Mistake: how it is made, the tensor that differs first, words.
MISTAKES = {
    "generator, keys": (
        given_other(aqr, "find_weights", tokens__positions=zeros("tokens/positions")),
        "aqr/weights", "weight generator: the keys have no position embeddings",
    ),
    "generator, queries": (
        given_other(aqr, "find_weights", queries__positions=zeros("queries/positions")),
        "aqr/weights", "weight generator: the queries have no position embeddings",
    ),
    "generator, scale": (projected(GENERATOR, HEAD_DIM**0.5), "aqr/weights", f"weight generator: {NO_SCALE}"),
    "generator, other scale": (
        projected(GENERATOR, (HEAD_DIM / DIM) ** 0.5), "aqr/weights", f"weight generator: {WHOLE_SCALE}",
    ),
    "generator, window": (wide_windows, "aqr/weights", "windows of lidar reach one cell more"),
    "eps 1e-12": (eps(1e-12), "aqr/weights", "the layer norms have an eps of 1e-12"),
    "eps 1e-3": (eps(1e-3), "aqr/weights", "the layer norms have an eps of 1e-3"),
    "scale missing": (constant("scale", 1.0), "bias/values", "the scale of 2.5 is missing"),
    "denoising mask": (
        attending("self_attention", lambda model, own, inputs, added: (inputs, 0)),
        "decoder/layer1.self", "the denoising mask was not applied",
    ),
    "self-attention, values": (
        attending("self_attention", lambda model, own, inputs, added: ((inputs[0],) * 3, added)),
        "decoder/layer0.self", "the values have position embeddings",
    ),
    "self-attention, scale": (projected("self_attention", HEAD_DIM**0.5), "decoder/layer1.self", NO_SCALE),
    "self-attention, other scale": (
        projected("self_attention", (HEAD_DIM / DIM) ** 0.5), "decoder/layer1.self", WHOLE_SCALE,
    ),
    "self-attention, late residual": (
        late_residual(f"{LAYER1}.norms.0"), "decoder/layer1.self", "the norm was taken before the residual sum",
    ),
    "self-attention, pre-norm": (
        pre_norm(f"{LAYER1}.self_attention", f"{LAYER1}.norms.0"), "decoder/layer1.self", "pre-norm, x + f(norm(x))",
    ),
    "cross-attention, queries": (
        given_other(decoder, "decode", queries__positions=zeros("queries/positions")),
        "decoder/layer0.lse", "the queries have no position embeddings",
    ),
    "cross-attention, keys": (
        given_other(decoder, "decode", tokens__positions=zeros("tokens/positions")),
        "decoder/layer0.lse", "the keys have no position embeddings",
    ),
    "cross-attention, values": (
        attending("cross_attention", lambda model, own, inputs, added: ((inputs[0], inputs[1], inputs[1]), added)),
        "decoder/layer0.cross", "the values have position embeddings",
    ),
    "cross-attention, other scale": (
        projected("cross_attention", (HEAD_DIM / DIM) ** 0.5), "decoder/layer0.lse", WHOLE_SCALE,
    ),
    "cross-attention, no bias": (
        attending("cross_attention", lambda model, own, inputs, added: (inputs, 0)),
        "decoder/layer0.lse", "the cross-attention has no bias",
    ),
    "cross-attention, bias of the first layer alone": (
        attending("layers.1.cross_attention", lambda model, own, inputs, added: (inputs, 0)),
        "decoder/layer1.lse", "the cross-attention has no bias: it belongs to all decoder layers",
    ),
    "cross-attention, divided bias": (
        attending("cross_attention", lambda model, own, inputs, added: (inputs, added / HEAD_DIM**0.5)),
        "decoder/layer0.lse", "the bias was added before the division by sqrt(D)",
    ),
    "cross-attention, pre-norm": (
        pre_norm(f"{LAYER0}.cross_attention", f"{LAYER0}.norms.1"), "decoder/layer0.lse", "pre-norm, x + f(norm(x))",
    ),
    "FFN, late residual": (
        late_residual(f"{LAYER1}.norms.2"), "decoder/layer1.output", "the norm was taken before the residual sum",
    ),
    "FFN, pre-norm": (
        pre_norm(f"{LAYER0}.ffn", f"{LAYER0}.norms.2"), "decoder/layer0.output", "pre-norm, x + f(norm(x))",
    ),
    "FFN, GELU": (gelu, "decoder/layer0.output", "the FFN has GELU, not ReLU"),
    "heads, no reference": (
        given_other(decoder, "predict", queries__reference_points=lambda made: 0 * made[POINTS] + 0.5),
        "heads/task0.center", "the reference point was not added",
    ),
    "heads, y and x": (
        given_other(decoder, "predict", queries__reference_points=lambda made: made[POINTS][..., [1, 0, 2]]),
        "heads/task0.center", "y of the reference point was added to x",
    ),
    "heads, no sigmoid": (functions(sigmoid=same), "heads/task0.center", "the sigmoid is missing"),
    "heads, neither": (
        functions(sigmoid=same, inverse_sigmoid=same),
        "heads/task0.center", "raw output was added to the reference point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_inside_a_layer_is_found_at_its_tensor_and_named(mistake, monkeypatch, tmp_path, capsys):
    patch, first, words = MISTAKES[mistake]
    patch(monkeypatch)
    save_file(port.run(Model(FOLDER, "float64")), tmp_path / "port.safetensors")
    assert main(["compare", str(FOLDER), str(tmp_path / "port.safetensors"), "--precision", "float64"]) == 1
    text = capsys.readouterr().out.partition("first stage that differs: ")[2]
    assert text.partition("\n")[2].lstrip().startswith(f"{first} "), text
    causes = [cause.partition("\n")[0] for cause in text.split("likely cause: ")[1:]]
    assert causes and all(words in cause for cause in causes), text
