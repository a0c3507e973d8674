"""Ways to damage a checkpoint: bytes of the file, its content with a right checksum, and other files in its place.

Every function takes the whole content of a good file (or the state in it) and a generator, and returns what is written
instead. A kind that left the file as it was would be a mistake of this module: the callers assert that it did not.
"""

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from cmt_aqr.training.checksum import ChecksumWriter

State = dict[str, Any]


def seal(state: Any) -> bytes:
    """A file as save_checkpoint writes it, without its checks."""
    file = io.BytesIO()
    writer = ChecksumWriter(file)
    torch.save(state, writer)
    writer.finish()
    return file.getvalue()


def unseal(content: bytes) -> State:
    """The state in a good file."""
    return torch.load(io.BytesIO(content), weights_only=True)


# Bytes


def flip_bit(content: bytes, rng: random.Random, first: int = 0) -> bytes:
    """One bit of a random byte from ``first`` on."""
    changed = bytearray(content)
    changed[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bit_at_the_end(content: bytes, rng: random.Random) -> bytes:
    """One bit of the checksum or of the zip's end record before it."""
    return flip_bit(content, rng, len(content) - 101)


def flip_bit_at_the_start(content: bytes, rng: random.Random) -> bytes:
    """One bit of the first 4 KiB: headers of records, the pickled structure, padding."""
    return flip_bit(content[:4096], rng) + content[4096:]


def change_byte(content: bytes, rng: random.Random) -> bytes:
    """Another value of one byte."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([(content[place] + rng.randrange(1, 256)) % 256]) + content[place + 1 :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content))]


def truncate_a_little(content: bytes, rng: random.Random) -> bytes:
    """A part of the checksum, all of it, or a little more is missing."""
    return content[: -rng.randrange(1, 120)]


def zero_a_range(content: bytes, rng: random.Random) -> bytes:
    """What a lost block of a disk looks like; a range that was zero before is drawn again."""
    while True:
        start = rng.randrange(len(content))
        stop = min(start + rng.choice((1, 8, 512, 4096, 65536)), len(content))
        changed = content[:start] + bytes(stop - start) + content[stop:]
        if changed != content:
            return changed


def swap_blocks(content: bytes, rng: random.Random) -> bytes:
    """Two blocks of 512 bytes in each other's place."""
    while True:
        a, b = sorted(512 * rng.randrange(len(content) // 512) for _ in range(2))
        first, second = content[a : a + 512], content[b : b + 512]
        if a != b and first != second:
            return content[:a] + second + content[a + 512 : b] + first + content[b + 512 :]


def insert_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes too many."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.randbytes(rng.randrange(1, 100)) + content[place:]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "one bit anywhere": flip_bit,
    "one bit of the first 4 KiB": flip_bit_at_the_start,
    "one bit of the end record or checksum": flip_bit_at_the_end,
    "one byte anywhere": change_byte,
    "truncated": truncate,
    "truncated by less than 120 bytes": truncate_a_little,
    "a range of zeros": zero_a_range,
    "two blocks swapped": swap_blocks,
    "bytes inserted": insert_bytes,
}

# Other files


class _Code:
    """An object that runs code when it is loaded."""

    def __reduce__(self):
        return print, ("this must not run",)


def _zip_of_another_program() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<document/>")
    return file.getvalue()


OTHER_FILES: dict[str, Callable[[State], bytes]] = {
    "empty": lambda state: b"",
    "a YAML file": lambda state: b"name: synthetic_tiny\nseed: 0\n",
    "a JSON file": lambda state: json.dumps({"results": {}}).encode(),
    "a picture": lambda state: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(2000),
    "random bytes": lambda state: random.Random(0).randbytes(5000),
    "safetensors": lambda state: save_safetensors(state["model"]),
    "a zip of another program": lambda state: _zip_of_another_program(),
    "a pickled dictionary of another program": lambda state: pickle.dumps({"epoch": 3}, protocol=2),
    "a pickle that runs code": lambda state: seal({**state, "model": _Code()}),
    "a whole module": lambda state: seal(nn.Linear(2, 2)),
    "a list": lambda state: seal([1, 2]),
    "another format": lambda state: seal({**state, "format": "other checkpoint 7"}),
    "a newer format": lambda state: seal({**state, "format": "cmt_aqr checkpoint 3"}),
    "the format is a number": lambda state: seal({**state, "format": 2}),
}

# Content


def without(tree: dict, key: str) -> dict:
    """The dictionary without a key."""
    assert key in tree
    return {name: value for name, value in tree.items() if name != key}


def replaced(tree: Any, keys: tuple, value: Any) -> Any:
    """The nested dictionaries and lists with another value in one place."""
    if not keys:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[keys[0]] = replaced(tree[keys[0]] if len(keys) > 1 else None, keys[1:], value)
    return copy


def _put(*keys_and_value: Any) -> Callable[[State], State]:
    *keys, value = keys_and_value
    return lambda state: replaced(state, tuple(keys), value)


def _weight(change: Callable[[torch.Tensor], Any]) -> Callable[[State], State]:
    """Change the first weight of at least two sides."""

    def apply(state: State) -> State:
        name = next(name for name, tensor in state["model"].items() if tensor.dim() > 1)
        return replaced(state, ("model", name), change(state["model"][name]))

    return apply


def _moment(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[State], State]:
    """Change a tensor of the optimizer's first parameter."""

    def apply(state: State) -> State:
        first = min(state["optimizer"]["state"])
        return replaced(state, ("optimizer", "state", first, key), change(state["optimizer"]["state"][first][key]))

    return apply


def _fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Another value in the last element."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.view(-1)[-1] = value
        return copy

    return apply


def _refer_to_itself(state: State) -> State:
    config = dict(state["config"])
    config["model"] = {**config["model"], "again": config}
    return {**state, "config": config}


def _deep(levels: int) -> list:
    tree: list = []
    for _ in range(levels):
        tree = [tree]
    return tree


def _without_weight(state: State) -> State:
    return {**state, "model": without(state["model"], next(iter(state["model"])))}


def _without_moment(state: State) -> State:
    first = min(state["optimizer"]["state"])
    return replaced(state, ("optimizer", "state", first), without(state["optimizer"]["state"][first], "exp_avg"))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


# What test.py reads too.
WEIGHTS: dict[str, Callable[[State], State]] = {
    "model missing": lambda state: without(state, "model"),
    "model empty": _put("model", {}),
    "model a list": _put("model", [1]),
    "model nothing": _put("model", None),
    "a whole number as name": lambda state: {**state, "model": {**state["model"], 3: torch.zeros(1)}},
    "a name of two lines": lambda state: {**state, "model": {**state["model"], "a\nb": torch.zeros(1)}},
    "a weight missing": _without_weight,
    "a weight too many": _put("model", "extra", torch.zeros(1)),
    "a weight is text": _weight(lambda tensor: "0.5"),
    "a weight of another shape": _weight(lambda tensor: tensor[1:].clone()),
    "a complex weight": _weight(lambda tensor: tensor.to(torch.complex64)),
    "a weight of integers": _weight(lambda tensor: tensor.to(torch.int64)),
    "a boolean weight": _weight(lambda tensor: tensor > 0),
    "a float8 weight": _weight(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "a meta weight": _weight(_meta),
    "a sparse weight": _weight(lambda tensor: tensor.to_sparse()),
    "a NaN weight": _weight(_fill(float("nan"))),
    "an infinite weight": _weight(_fill(float("-inf"))),
    "config missing": lambda state: without(state, "config"),
    "config nothing": _put("config", None),
    "config a list": _put("config", [1]),
    "config empty": _put("config", {}),
    "config.model missing": lambda state: {**state, "config": without(state["config"], "model")},
    "config.model text": _put("config", "model", "large"),
    "a key of config.model missing": lambda state: replaced(
        state, ("config", "model"), without(state["config"]["model"], "num_queries")
    ),
    "a key of config.model is a number": _put("config", "model", 7, 1),
    "a tensor in config": _put("config", "model", "num_queries", torch.arange(3)),
    "another value in config": _put("config", "model", "num_queries", 7),
    "a number of 500 digits in config": _put("config", "model", "num_queries", 10**500),
    "a config that refers to itself": _refer_to_itself,
    "300 nested lists in config": _put("config", "model", "num_queries", _deep(300)),
    "no checksum": lambda state: state,
}
# What only a resumed run reads.
RUN: dict[str, Callable[[State], State]] = {
    **{f"{key} missing": lambda state, key=key: without(state, key) for key in ("step", "optimizer", "scaler")},
    "step a text": _put("step", "7"),
    "step nothing": _put("step", None),
    "step true": _put("step", True),
    "step 3.0": _put("step", 3.0),
    "step NaN": _put("step", float("nan")),
    "step -1": _put("step", -1),
    "step 10**6": _put("step", 10**6),
    "step 10**500": _put("step", 10**500),
    "step a tensor": _put("step", torch.arange(2)),
    "optimizer nothing": _put("optimizer", None),
    "optimizer empty": _put("optimizer", {}),
    "optimizer a list": _put("optimizer", [1]),
    "optimizer state empty": _put("optimizer", "state", {}),
    "optimizer state a list": _put("optimizer", "state", []),
    "optimizer of another model": lambda state: {
        **state,
        "optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
    },
    "optimizer groups text": _put("optimizer", "param_groups", "groups"),
    "optimizer groups of tensors": _put("optimizer", "param_groups", 0, "params", [torch.arange(2)]),
    "optimizer key a text": _put("optimizer", "state", "first", {}),
    "optimizer key beyond": _put("optimizer", "state", 10**6, {}),
    "optimizer entry empty": _put("optimizer", "state", 0, {}),
    "optimizer entry a number": _put("optimizer", "state", 0, 3),
    "exp_avg missing": _without_moment,
    "exp_avg a number": _moment("exp_avg", lambda tensor: 0.5),
    "exp_avg of another shape": _moment("exp_avg", lambda tensor: torch.zeros(1, 2, 3)),
    "exp_avg NaN": _moment("exp_avg", _fill(float("nan"))),
    "exp_avg complex": _moment("exp_avg", lambda tensor: tensor.to(torch.complex64)),
    "exp_avg sparse": _moment("exp_avg", lambda tensor: tensor.to_sparse()),
    "exp_avg meta": _moment("exp_avg", _meta),
    "exp_avg of integers": _moment("exp_avg", lambda tensor: tensor.to(torch.int32)),
    "exp_avg_sq infinite": _moment("exp_avg_sq", _fill(float("inf"))),
    "exp_avg_sq negative": _moment("exp_avg_sq", _fill(-1.0)),
    "updates NaN": _moment("step", _fill(float("nan"))),
    "updates negative": _moment("step", _fill(-3.0)),
    "scaler nothing": _put("scaler", None),
    "scaler a list": _put("scaler", [1.0]),
    "scaler of another precision": _put("scaler", {"scale": float("nan"), "growth_factor": 2.0}),
}


def damage(good: bytes, group: str, kind: str, rng: random.Random) -> bytes:
    """The content to write instead of ``good``; it is never the same."""
    if group == "bytes":
        content = BYTES[kind](good, rng)
    elif group == "file":
        content = OTHER_FILES[kind](unseal(good))
    else:
        state = (WEIGHTS | RUN)[kind](unseal(good))
        content = seal(state)
        if kind == "no checksum":
            file = io.BytesIO()
            torch.save(state, file)
            content = file.getvalue()
    assert content != good, (group, kind)
    return content
