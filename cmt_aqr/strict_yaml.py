"""YAML -> frozen dataclasses, strictly: unknown, missing, mistyped and out-of-range keys are all reported at once.

The dataclasses are the schema. A field's type says what it accepts: bool, int, float, str, ``Literal``, ``X | None``,
``tuple[X, ...]``, ``tuple[X, Y, Z]``, ``dict[str, X]`` and nested dataclasses. A field's ``limits`` add a range.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cmt_aqr.yaml_reader import ConfigError, dump_yaml, parse_yaml, show, show_key, show_value, suggest

T = TypeVar("T")
Problems = list[tuple[str, str]]  # (dotted key, what is wrong)
# A file that is no configuration at all has thousands.
MAX_PROBLEMS = 40
# No setting is near it, and sums and ratios of smaller numbers stay finite.
MAX_NUMBER = 1e30


def limits(
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    entries: tuple[int, int] | None = None,
) -> Any:
    """A dataclass field with a range: ``low <= value``, ``above < value``, ``value <= high`` (also inside tuples).

    ``entries`` are the fewest and the most values of a tuple, of inner tuples too.
    """
    return dataclasses.field(metadata={"low": low, "above": above, "high": high, "entries": entries})


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Apply ``a.b=c`` to a nested dictionary, in place and in order; the values are YAML.

    Returns:
        dotted key -> the entry that set it, for :func:`build`.

    Raises:
        ConfigError: an entry has no ``=``, or goes through something that is not a mapping. Unknown keys are found
            later, by :func:`build`, so that they are reported with everything else.
    """
    problems, origins = [], {}
    for entry in overrides:
        shown = f"--set {show_key(entry)}"
        path, equals, text = entry.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"{shown}: expected KEY=VALUE with a dotted key, such as training.epochs=3")
            continue
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            problems.append(f"{shown}: {show_value(text)} is not a YAML value: {error}")
            continue
        block = tree
        for depth, key in enumerate(keys[:-1]):
            inner = block.setdefault(key, {})
            if not isinstance(inner, dict):
                problems.append(f"{shown}: {'.'.join(keys[: depth + 1])} is {show(inner)}, not a block of keys")
                break
            block = inner
        else:
            block[keys[-1]] = value
            origins[".".join(map(show_key, keys))] = shown
    if problems:
        raise ConfigError(problems)
    return origins


# A check across keys: the keys it reads, and a function of the configuration that yields (key, problem).
Check = tuple[tuple[str, ...], Callable[[Any], Iterable[tuple[str, str]]]]


def build(
    schema: type[T],
    tree: Any,
    source: str,
    checks: Sequence[Check] = (),
    origins: Mapping[str, str] = types.MappingProxyType({}),
) -> T:
    """Turn a nested dictionary into the dataclass ``schema``.

    Args:
        schema: a frozen dataclass whose fields have no defaults: a file must name every key.
        tree: what :func:`read_yaml` gives.
        source: what the tree was read from; begins every problem.
        checks: run when the keys they read are sound, also when others are not, so that all is reported at once.
        origins: what :func:`apply_overrides` returns; a problem of such a key names the entry instead of the source,
            a contradiction with one names both.

    Raises:
        ConfigError: with every problem found, in the order of the schema, then of the checks.
    """
    problems: Problems = []
    value = _convert(schema, tree, "", problems)
    unsound = [path for path, _ in problems]
    found = [(path, text, (path,)) for path, text in problems]
    for reads, check in checks:
        if value is not None and not any(_overlap(path, key) for path in unsound for key in reads):
            found += [(path, text, reads) for path, text in check(value)]
    if found:
        lines = [
            f"{name_source(path, reads, source, origins)}: {path or 'top level'}: {text}" for path, text, reads in found
        ]
        hidden = len(lines) - MAX_PROBLEMS
        raise ConfigError(lines if hidden <= 0 else [*lines[:MAX_PROBLEMS], f"{source}: and {hidden} more problems"])
    return value


def name_source(path: str, reads: Sequence[str], source: str, origins: Mapping[str, str]) -> str:
    """What a problem at a key comes from: entries of ``--set``, the source, or both.

    Args:
        path: the dotted key.
        reads: the keys that the problem depends on.
        source: what the configuration was read from.
        origins: what :func:`apply_overrides` returns.
    """
    own = [entry for key, entry in origins.items() if _overlap(path, key)]
    if own:
        return ", ".join(own)
    related = [entry for key, entry in origins.items() if any(_overlap(read, key) for read in reads)]
    return f"{source} with {', '.join(related)}" if related else source


def _overlap(left: str, right: str) -> bool:
    """Is one key the other, or inside the other? The top level, an empty key, holds all."""
    if not left or not right:
        return True
    left, right = left.replace("[", ".[") + ".", right.replace("[", ".[") + "."
    return left.startswith(right) or right.startswith(left)


def to_tree(config: Any) -> Any:
    """A dataclass as plain dictionaries and lists: what :func:`build` accepts, JSON and YAML can write."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_tree(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    if isinstance(config, dict):
        return {key: to_tree(item) for key, item in config.items()}
    return config


def to_yaml(config: Any) -> str:
    """A dataclass as YAML text, keys in the order of the schema."""
    return dump_yaml(to_tree(config))


def differences(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two trees differ, with both values; empty when they are equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        found = []
        for key in [*left, *(key for key in right if key not in left)]:
            found += differences(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if left == right else [f"{prefix}: {show_value(left)} against {show_value(right)}"]


def _convert(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_block(kind, value, path, problems)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _convert(inner[0], value, path, problems)
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if not any(value == option and type(value) is type(option) for option in options):
            wanted = ", ".join(map(repr, options))
            problems.append((path, f"expected one of {wanted}, got {show(value)}{suggest(value, options)}"))
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, path, problems)
    if origin is dict:
        return _convert_dict(typing.get_args(kind)[1], value, path, problems)
    return _convert_scalar(kind, value, path, problems)


def _convert_block(schema: type, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.append((path, f"expected a block of keys, got {show(value)}"))
        return None
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            problems.append((f"{prefix}{show_key(key)}", f"unknown key{suggest(key, fields)}"))
    before = len(problems)
    converted = {}
    for name, field in fields.items():
        if name not in value:
            problems.append((prefix + name, "missing key"))
            continue
        own = len(problems)
        converted[name] = _convert(hints[name], value[name], prefix + name, problems)
        if len(problems) == own:
            _check_limits(field.metadata, converted[name], prefix + name, problems)
    # With problems inside, the checks across keys still want the values that are sound.
    return schema(**converted) if len(problems) == before else types.SimpleNamespace(**converted)


def _convert_tuple(kinds: tuple, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, list | tuple):
        problems.append((path, f"expected a list, got {show(value)}"))
        return None
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        problems.append((path, f"expected a list of {len(kinds)} values, got {len(value)}: {show(value)}"))
        return None
    return tuple(_convert(kind, item, f"{path}[{i}]", problems)
                 for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))  # fmt: skip


def _convert_dict(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.append((path, f"expected a block of keys, got {show(value)}"))
        return None
    for key in value:
        if not isinstance(key, str):
            problems.append((f"{path}.{show_key(key)}", f"expected text as a key, got {show(key)}"))
    return {key: _convert(kind, item, f"{path}.{show_key(key)}", problems) for key, item in value.items()}


def _convert_scalar(kind: type, value: Any, path: str, problems: Problems) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and kind in (int, float) and not -MAX_NUMBER < value < MAX_NUMBER:
        expected = "a finite number" if kind is float else "a whole number"
        problems.append((path, f"expected {expected}, got {show_value(value)}"))
        return None
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind is str and isinstance(value, str) and not value.isprintable():
        problems.append((path, f"expected text without control characters, got {show_value(value)}"))
        return None
    if kind in (bool, str) and isinstance(value, kind):
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    problems.append((path, f"expected {names[kind]}, got {show(value)}"))
    return None


def _check_limits(bounds: Any, value: Any, path: str, problems: Problems) -> None:
    if not bounds or value is None:
        return
    if isinstance(value, tuple):
        entries = bounds["entries"]
        if entries is not None and not entries[0] <= len(value) <= entries[1]:
            problems.append((path, f"expected {entries[0]} to {entries[1]} entries, got {len(value)}"))
        for i, item in enumerate(value):
            _check_limits(bounds, item, f"{path}[{i}]", problems)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            _check_limits(bounds, item, f"{path}.{show_key(key)}", problems)
        return
    if bounds["low"] is not None and value < bounds["low"]:
        problems.append((path, f"must be at least {bounds['low']}, got {value}"))
    if bounds["above"] is not None and value <= bounds["above"]:
        problems.append((path, f"must be above {bounds['above']}, got {value}"))
    if bounds["high"] is not None and value > bounds["high"]:
        problems.append((path, f"must be at most {bounds['high']}, got {value}"))
