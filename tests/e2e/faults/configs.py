"""Random mutations of the shipped configurations: each is refused in plain sentences, or can be built.

    python -m tests.e2e.faults.configs --count 1000

A mutated file goes through ``load_config``; where that accepts it, the model (on the meta device), the loss and the
augmentations are built from it.

    python -m tests.e2e.faults.configs --exhaustive

replaces every value of every shipped file by one of every kind, and removes every key.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from cmt_aqr.build import build_criterion, build_on_meta, check_training
from cmt_aqr.config import Config, ConfigError, config_from_tree, load_config, naming_source
from cmt_aqr.yaml_reader import show_value
from tests.e2e.faults.outcomes import Outcome, failures, observe, report, summary

FOLDER = Path(__file__).parents[3] / "configs"
SHIPPED = tuple(sorted(FOLDER.rglob("*.yaml")))
SECONDS = 20.0
# A value of every kind, and numbers at which arithmetic breaks.
VALUES: tuple[Any, ...] = (
    None, "text", "", "a\0b", "\ud7ff\u202e", "../../x", "/", "x" * 5000, "x/" * 3000, True, False, 0, -1, 1, 2, 3, 7,
    17, 0.5, 1e-30, 1e30, 1e308, -1e308, 2**31, 2**63, 10**39, 10**400, float("nan"), float("inf"), -float("inf"),
    [], {}, [None], [[]], [[[]]], [1], [1, 2], [3, 2, 1], ["a"], list(range(1000)), {"a": 1}, {1: 2}, {None: None},
    {"": 0}, {"a": {"b": {}}},
)  # fmt: skip
# Of these every value of every shipped file is replaced by each.
KINDS: tuple[Any, ...] = (
    None, "text", 3, -1, 1e9, 10**40, [1], [], {"a": 1}, True, float("nan"), float("inf"), "a\0b", {"x" * 5000: {}},
    {1: 2},
)  # fmt: skip
Tree = dict[str, Any]
Place = tuple[Any, Any]  # a mapping or list, and a key or position in it


def places(tree: Any) -> Iterator[Place]:
    """Every value of a tree, by where it is."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def names(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted name of every value, in the order of :func:`places`."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        name = f"{prefix}.{key}" if isinstance(tree, dict) and prefix else f"{prefix}[{key}]" if prefix else key
        yield name
        if isinstance(tree[key], dict | list):
            yield from names(tree[key], name)


def _pick(rng: random.Random, tree: Tree, kind: type | tuple[type, ...] = object) -> Place:
    return rng.choice([(at, key) for at, key in places(tree) if isinstance(at[key], kind) and at[key] is not True])


def _remove(rng: random.Random, tree: Tree) -> None:
    at, key = rng.choice([place for place in places(tree) if isinstance(place[0], dict)])
    del at[key]


def _replace(rng: random.Random, tree: Tree) -> None:
    at, key = _pick(rng, tree)
    at[key] = rng.choice(VALUES)


def _scale(rng: random.Random, tree: Tree) -> None:
    at, key = _pick(rng, tree, (int, float))
    scaled = at[key] * rng.choice((-1, 0, 0.25, 0.5, 2, 3, 10, 1000, 1e6, 1e12))
    at[key] = round(scaled) if isinstance(at[key], int) else scaled


def _scale_several(rng: random.Random, tree: Tree) -> None:
    for _ in range(3):
        at, key = _pick(rng, tree["model"], (int, float))
        at[key] = type(at[key])(at[key] * rng.choice((0.5, 2, 3)))


def _change_list(rng: random.Random, tree: Tree) -> None:
    at, key = _pick(rng, tree, list)
    values = list(at[key])
    at[key] = rng.choice((values[::-1], values[:-1], values + values, values[:1] * len(values), [values], []))


def _misspell(rng: random.Random, tree: Tree) -> None:
    at, key = rng.choice([place for place in places(tree) if isinstance(place[0], dict)])
    where = rng.randrange(len(key))
    at[rng.choice((key[:where] + key[where + 1 :], key + "s", key.upper(), key * 1000, f"{key}\n"))] = at.pop(key)


def _swap(rng: random.Random, tree: Tree) -> None:
    (left, i), (right, k) = rng.sample([place for place in places(tree) if not isinstance(place[0][place[1]], dict)], 2)
    left[i], right[k] = right[k], left[i]


def _transplant(rng: random.Random, tree: Tree) -> None:
    other = yaml.safe_load(rng.choice(SHIPPED).read_text())
    block = rng.choice(("data", "model", "training", "loss"))
    key = rng.choice(list(tree[block]))
    tree[block][key] = other[block][key]


def _text(change: Callable[[random.Random, str], str | bytes]) -> Callable[[random.Random, str], bytes]:
    def mutate(rng: random.Random, text: str) -> bytes:
        changed = change(rng, text)
        return changed if isinstance(changed, bytes) else changed.encode()

    return mutate


def _tree(change: Callable[[random.Random, Tree], None]) -> Callable[[random.Random, str], bytes]:
    def mutate(rng: random.Random, text: str) -> bytes:
        tree = yaml.safe_load(text)
        change(rng, tree)
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False).encode()

    return mutate


class _Dumper(yaml.SafeDumper):
    """Writes the same list twice instead of an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _lines(change: Callable[[random.Random, list[str], int], None]) -> Callable[[random.Random, str], str]:
    def mutate(rng: random.Random, text: str) -> str:
        lines = text.splitlines()
        change(rng, lines, rng.randrange(len(lines)))
        return "\n".join(lines) + "\n"

    return mutate


def _characters(rng: random.Random, text: str) -> str:
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice("{}[]:,#&*!|>'\"%@`-?\t\n \x07é0") + text[at + 1 :]
    return text


def _random_bytes(rng: random.Random, text: str) -> bytes:
    at = rng.randrange(len(text))
    return text[:at].encode() + rng.randbytes(rng.randrange(1, 20)) + text[at:].encode()


def _features(rng: random.Random, text: str) -> str:
    value = rng.choice((
        "&x 1", "*x", "!!binary aGk=", "!!set {a, b}", "!!python/name:os.system", "!!timestamp 2024-01-01",
        "2024-01-01", "2024-01-01 10:20:30", "!x 1", "0x_", "0b_", "010", "1:30:20", "<<", "=", "|\n  text\n", ">-\n a",
        "[" * 3000, "{a: " * 3000, "- " * 3000, "? " * 500, "9" * 400, "9" * 5000, "1e400", "-.inf", "~", "no", "''",
        "{<<: {a: 1}}", "&a [*a]", "&a {b: *a}", '"\\0"', '"\\ud800"', "%TAG", "--- 1", "...",
    ))  # fmt: skip
    lines = text.splitlines()
    numbered = [i for i, line in enumerate(lines) if re.match(r"^ *\w+: \S", line)]
    at = rng.choice(numbered)
    lines[at] = f"{lines[at].split(':')[0]}: {value}"
    return "\n".join(lines) + "\n"


def _indent(rng: random.Random, lines: list[str], at: int) -> None:
    lines[at] = rng.choice(("  ", " ", "\t")) + lines[at] if rng.random() < 0.6 else lines[at].lstrip()


MUTATIONS: tuple[tuple[str, Callable[[random.Random, str], bytes]], ...] = (
    ("keys: one removed", _tree(_remove)),
    ("keys: one misspelt", _tree(_misspell)),
    ("values: another kind, or an extreme", _tree(_replace)),
    ("values: one number scaled", _tree(_scale)),
    ("values: three numbers of the model scaled", _tree(_scale_several)),
    ("values: a list changed", _tree(_change_list)),
    ("values: two swapped", _tree(_swap)),
    ("values: taken from another configuration", _tree(_transplant)),
    ("text: a line removed", _text(_lines(lambda rng, lines, at: lines.pop(at)))),
    ("text: a line repeated", _text(_lines(lambda rng, lines, at: lines.insert(at, rng.choice(lines))))),
    ("text: a line indented otherwise", _text(_lines(_indent))),
    ("text: characters changed", _text(_characters)),
    ("text: random bytes inserted", _text(_random_bytes)),
    ("text: cut short", _text(lambda rng, text: text[: rng.randrange(len(text))])),
    ("text: other features of YAML", _text(_features)),
    ("text: another encoding", _text(lambda rng, text: text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))))),
)


def use(path: Path, original: Any) -> bool:
    """Load a file and build all that it describes; True when it is the original in other words.

    Raises:
        ConfigError: the first problem, once all have been found to be one sentence each that names the file.
    """
    try:
        config = load_config(path)
        with naming_source(path):
            check_training(config, torch.device("cpu"))  # builds the model on the meta device
    except ConfigError as error:
        raise ConfigError([worst(error.problems, f"{path}: ")]) from None
    build_criterion(config, reduce_mean=None, num_processes=1)
    return config == original


def run(folder: Path, *, count: int, seed: int, first: int = 0) -> list[Outcome]:
    """Mutate ``count`` configurations; number ``first`` and the seed decide which."""
    originals = {path: load_config(path) for path in SHIPPED}
    build_on_meta(originals[SHIPPED[0]].model)  # the first import of spconv takes longer than any build
    outcomes = []
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        kind, mutate = MUTATIONS[number % len(MUTATIONS)]
        base = rng.choice(SHIPPED)
        path = folder / f"{number}.yaml"
        path.write_bytes(mutate(rng, base.read_text()))
        result, text = observe(
            lambda path=path, base=base: use(path, originals[base]), named=[f"{path}: "], limit=SECONDS
        )
        outcomes.append(Outcome(kind, f"{base.stem} as {path.name}", result, text))
    return outcomes


def exhaustive(path: Path) -> Iterator[Outcome]:
    """Every value of a shipped file replaced by one of every kind, and every key removed, one at a time."""
    tree = yaml.safe_load(path.read_text())
    original = config_from_tree(tree, "file")
    built: set[str] = set()  # each model is built once
    for name, (at, key) in list(zip(names(tree), places(tree), strict=True)):
        value = at[key]
        for kind in KINDS:
            at[key] = kind
            result, text = observe(lambda: settle(tree, original, built), named=["file: "], limit=SECONDS)
            yield Outcome(f"{name.split('.')[0]}: replaced", f"{path.stem}: {name} = {show_value(kind)}", result, text)
        if isinstance(at, dict):
            del at[key]
            result, text = observe(lambda: settle(tree, original, built), named=["file: "], limit=SECONDS)
            yield Outcome(f"{name.split('.')[0]}: removed", f"{path.stem}: {name} removed", result, text)
        at[key] = value


def settle(tree: Tree, original: Config, built: set[str]) -> bool:
    """Turn a tree into a configuration and build what it describes; True when it is the original.

    Args:
        built: settings of models and their training that need not be built again; grows.

    Raises:
        ConfigError: the first problem, once all have been found to be one sentence each that names the source.
    """
    try:
        config = config_from_tree(tree, "file")
        training = config.training
        prefixes = (training.lr_mult, training.decay_mult, training.freeze, training.norm_eval)
        if repr((config.model, prefixes)) not in built:
            with naming_source("file"):
                check_training(config, torch.device("cpu"))
            built.add(repr((config.model, prefixes)))
    except ConfigError as error:
        raise ConfigError([worst(error.problems, "file: ")]) from None
    build_criterion(config, reduce_mean=None, num_processes=1)
    return config == original


def worst(problems: Sequence[str], start: str) -> str:
    """The first problem that is not one short line that begins as it must, else the first."""
    bad = [line for line in problems if "\n" in line or len(line) > 999 or not line.startswith(start)]
    return bad[0] if bad else problems[0]


def run_exhaustive() -> list[Outcome]:
    """All shipped files; prints a line of progress for each."""
    build_on_meta(load_config(SHIPPED[0]).model)  # the first import of spconv takes longer than any build
    outcomes = []
    for path in SHIPPED:
        start = time.monotonic()
        found = list(exhaustive(path))
        outcomes += found
        print(
            f"{path.stem}: {len(found)} in {time.monotonic() - start:.0f} s, {len(failures(found))} failures",
            flush=True,
        )
    return outcomes


def main() -> int:
    """Run the command line; exit status 1 when a mutation led to a traceback, a hang or a bad sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation, to repeat one")
    parser.add_argument("--exhaustive", action="store_true", help="every value by every kind instead of random ones")
    options = parser.parse_args()
    if options.exhaustive:
        outcomes = run_exhaustive()
        print(summary(outcomes, Path("file")))
        for outcome in failures(outcomes)[:20]:
            print(f"\n{outcome.what}: {outcome.result}\n{outcome.text}")
        return 1 if failures(outcomes) else 0
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder), count=options.count, seed=options.seed, first=options.first)
        return report(outcomes, Path(folder), first=options.first)


if __name__ == "__main__":
    sys.exit(main())
