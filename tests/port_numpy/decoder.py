"""Sections 7 to 9 of docs/porting.md: decoder, heads and boxes."""

import math

import numpy as np
from numpy import ndarray

from .model import Model, inverse_sigmoid, normalise, sigmoid, softmax

HEAD_EPS = 1e-6
QUERY, KEY, VALUE = range(3)
BOX_BRANCHES = ("center", "height", "dim", "rot", "vel")


def decode(model: Model, bias: ndarray | None, made: dict) -> None:
    """decoder/*: all layers."""
    positions = made["queries/positions"]
    values = made.get("aqr/tokens", made["tokens/values"])
    keys = values + made["tokens/positions"]
    mask = np.where(model.given("denoising/attention_mask"), 0, -np.inf) if "denoising/attention_mask" in model else 0
    added = 0 if bias is None else bias[:, None]
    x, hidden = np.zeros_like(positions), []
    for number in range(model.constants["num_layers"]):
        name, layer = f"decoder/layer{number}", f"decoder.layers.{number}"
        out, _ = attention(model, f"{layer}.self_attention", (x + positions, x + positions, x), mask)
        x = made[f"{name}.self"] = add_and_norm(model, f"{layer}.norms.0", x, out)
        out, made[f"{name}.lse"] = attention(model, f"{layer}.cross_attention", (x + positions, keys, values), added)
        x = made[f"{name}.cross"] = add_and_norm(model, f"{layer}.norms.1", x, out)
        x = add_and_norm(model, f"{layer}.norms.2", x, model.mlp(f"{layer}.ffn", x))
        normed = model.norm("decoder.post_norm", x)
        if model.mistake == "shared norm in the chain":
            x = normed
        made[f"{name}.output"] = x
        hidden.append(normed)
    made["decoder/hidden"] = np.stack(hidden)


def add_and_norm(model: Model, name: str, x: ndarray, out: ndarray) -> ndarray:
    """Post-norm: norm(x + out)."""
    if model.mistake == "norm before the residual":
        return x + model.norm(name, out)
    return model.norm(name, x + out)


def attention(model: Model, name: str, inputs: tuple, added: ndarray | float) -> tuple[ndarray, ndarray]:
    """Query, key, value (B, N, C) -> (B, Q, C), lse (B, M, Q); ``added`` to the scores (B, M, Q, K)."""
    q, k, v = (model.project(name, part, x) for part, x in enumerate(inputs))
    divisor = 1.0 if model.mistake == "no softmax scale" else math.sqrt(q.shape[-1])
    scores = q @ k.swapaxes(-1, -2) / np.asarray(divisor, q.dtype) + np.asarray(added, q.dtype)
    shares, lse = softmax(scores)
    if model.mistake == "lse to base 2":
        lse = lse / np.asarray(math.log(2), lse.dtype)
    return model.merge(name, shares @ v), lse


def predict(model: Model, made: dict) -> None:
    """heads/*: all branches of all tasks."""
    points, hidden = made["queries/reference_points"], made["decoder/hidden"]
    logits = inverse_sigmoid(points)
    if model.mistake == "no inverse sigmoid":
        logits = points
    num_queries = model.constants["num_queries"]
    is_padding = np.zeros(points.shape[1], bool)
    if "denoising/is_valid" in model:
        is_padding[:-num_queries] = ~model.given("denoising/is_valid")
    low, high = model.range_in(model.dtype)
    for task in range(len(model.constants["tasks"])):
        for name in (*BOX_BRANCHES, "cls_logits"):
            raw = branch(model, f"head.tasks.{task}.branches.{name}", hidden, is_padding)
            if name == "center":
                raw = sigmoid(raw + logits[..., :2]) * (high - low)[:2] + low[:2]
            elif name == "height":
                raw = sigmoid(raw + logits[..., 2:]) * (high - low)[2:] + low[2:]
            made[f"heads/task{task}.{name}"] = raw


def branch(model: Model, name: str, x: ndarray, is_padding: ndarray) -> ndarray:
    """(L, B, Q, C) -> (L, B, Q, width)."""
    y = conv(model.weight(f"{name}.conv.weight"), x, is_padding)
    scale, shift = (model.weight(f"{name}.norm.{kind}").reshape(len(x), 1, 1, -1) for kind in ("weight", "bias"))
    y = np.maximum(normalise(y, HEAD_EPS) * scale + shift, 0)
    bias = model.weight(f"{name}.out.bias").reshape(len(x), 1, 1, -1)
    return conv(model.weight(f"{name}.out.weight"), y, is_padding) + bias


def conv(weight: ndarray, x: ndarray, is_padding: ndarray) -> ndarray:
    """Along the queries, with other weights (L width, C, kernel) for every layer of x (L, B, Q, C)."""
    layers, _, queries, _ = x.shape
    weight = weight.reshape(layers, -1, *weight.shape[1:])
    kernel = weight.shape[-1]
    if kernel > 1:
        x = np.where(is_padding[:, None], 0, x)
    padded = np.pad(x, ((0, 0), (0, 0), (kernel // 2, kernel // 2), (0, 0)))
    return sum(
        np.einsum("lbqc,lwc->lbqw", padded[:, :, tap : tap + queries], weight[..., tap]) for tap in range(kernel)
    )


def select_boxes(model: Model, made: dict) -> None:
    """boxes/*: the best scores of every sample and their boxes."""
    constants, tasks = model.constants, model.constants["tasks"]
    queries = slice(-constants["num_queries"], None)
    last = {name: x[-1][:, queries] for name, x in made.items() if name.startswith("heads/")}
    scores = sigmoid(np.concatenate([last[f"heads/task{task}.cls_logits"] for task in range(len(tasks))], -1))
    if model.mistake == "sigmoid twice":
        scores = sigmoid(scores)
    codes = [np.concatenate([last[f"heads/task{t}.{name}"] for name in BOX_BRANCHES], -1) for t in range(len(tasks))]
    columns = [(task, label) for task, labels in enumerate(tasks) for label in labels]
    for sample, flat in enumerate(scores.reshape(len(scores), -1)):
        best = np.argsort(-flat, kind="stable")[: constants["max_detections"]]
        query, column = best // len(columns), best % len(columns)
        owner, label = np.array(columns, np.int64)[column].T
        boxes = decode_boxes(model, np.stack(codes)[owner, sample, query])
        low, high = np.split(np.array(constants["post_range"], model.dtype), 2)
        kept = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(-1)
        if constants["score_threshold"]:
            kept &= flat[best] > constants["score_threshold"]
        found = {"queries": query, "labels": label, "scores": flat[best], "boxes": boxes}
        made |= {f"boxes/{name}.{sample}": x[kept] for name, x in found.items()}


def decode_boxes(model: Model, codes: ndarray) -> ndarray:
    """Codes (n, 10) -> boxes (n, 9)."""
    if model.mistake == "box code order":
        x, y, z, log_l, log_w, log_h, sin, cos, vx, vy = codes.T
    else:
        x, y, log_l, log_w, z, log_h, sin, cos, vx, vy = codes.T
    if model.mistake == "yaw sign":
        sin = -sin
    length, width, height = (np.exp(size) for size in (log_l, log_w, log_h))
    return np.stack((x, y, z, length, width, height, np.arctan2(sin, cos), vx, vy), -1)
