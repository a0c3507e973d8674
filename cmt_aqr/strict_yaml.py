"""YAML -> frozen dataclasses, strictly: unknown, missing, mistyped and out-of-range keys are all reported at once.

The dataclasses are the schema. A field's type says what it accepts: bool, int, float, str, ``Literal``, ``X | None``,
``tuple[X, ...]``, ``tuple[X, Y, Z]``, ``dict[str, X]`` and nested dataclasses. A field's ``limits`` add a range.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cmt_aqr.errors import UserError

T = TypeVar("T")
Problems = list[tuple[str, str]]  # (dotted key, what is wrong)


class ConfigError(UserError):
    """A configuration that cannot be used; ``str()`` lists every problem, one a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def limits(*, low: float | None = None, above: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with a range: ``low <= value``, ``above < value``, ``value <= high`` (also inside tuples)."""
    return dataclasses.field(metadata={"low": low, "above": above, "high": high})


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            line = node.start_mark.line + 1
            raise ConfigError([f"key {repeated[0]!r} appears more than once in the block that starts at line {line}"])
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, repeats a key, or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file{_similar_file(path)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    try:
        tree = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError([f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: expected a mapping of keys, got {_kind(tree)}"])
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``a.b=c`` to a nested dictionary, in place and in order; the values are YAML.

    Raises:
        ConfigError: an entry has no ``=``, or goes through something that is not a mapping. Unknown keys are found
            later, by :func:`build`, so that they are reported with everything else.
    """
    problems = []
    for entry in overrides:
        path, equals, text = entry.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"--set {entry}: expected KEY=VALUE with a dotted key, such as training.epochs=3")
            continue
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ConfigError):
            problems.append(f"--set {entry}: {text!r} is not a YAML value")
            continue
        place = tree
        for depth, key in enumerate(keys[:-1]):
            inner = place.setdefault(key, {})
            if not isinstance(inner, dict):
                problems.append(f"--set {entry}: {'.'.join(keys[: depth + 1])} is {_show(inner)}, not a block of keys")
                break
            place = inner
        else:
            place[keys[-1]] = value
    if problems:
        raise ConfigError(problems)


# A check across keys: the keys it reads, and a function of the configuration that yields (key, problem).
Check = tuple[tuple[str, ...], Callable[[Any], Iterable[tuple[str, str]]]]


def build(schema: type[T], tree: Any, source: str, checks: Sequence[Check] = ()) -> T:
    """Turn a nested dictionary into the dataclass ``schema``.

    Args:
        schema: a frozen dataclass whose fields have no defaults: a file must name every key.
        tree: what :func:`read_yaml` gives.
        source: what the tree was read from; begins every problem.
        checks: run when the keys they read are sound, also when others are not, so that all is reported at once.

    Raises:
        ConfigError: with every problem found, in the order of the schema, then of the checks.
    """
    problems: Problems = []
    value = _convert(schema, tree, "", problems)
    unsound = [path for path, _ in problems]
    for reads, check in checks:
        if not any(_overlap(path, key) for path in unsound for key in reads):
            problems.extend(check(value))
    if problems:
        raise ConfigError([f"{source}: {path or 'top level'}: {text}" for path, text in problems])
    return value


def _overlap(left: str, right: str) -> bool:
    """Is one key the other, or inside the other?"""
    left, right = left.replace("[", ".[") + ".", right + "."
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
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None, width=110)


def differences(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two trees differ, with both values; empty when they are equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        found = []
        for key in [*left, *(key for key in right if key not in left)]:
            found += differences(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if left == right else [f"{prefix}: {_value(left)} against {_value(right)}"]


def _convert(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_block(kind, value, path, problems)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _convert(inner[0], value, path, problems)
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if value not in options:
            wanted = ", ".join(map(repr, options))
            problems.append((path, f"expected one of {wanted}, got {_show(value)}{_suggest(value, options)}"))
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, path, problems)
    if origin is dict:
        return _convert_dict(typing.get_args(kind)[1], value, path, problems)
    return _convert_scalar(kind, value, path, problems)


def _convert_block(schema: type, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.append((path, f"expected a block of keys, got {_show(value)}"))
        return None
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            problems.append((f"{prefix}{key}", f"unknown key{_suggest(key, fields)}"))
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
        problems.append((path, f"expected a list, got {_show(value)}"))
        return None
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        problems.append((path, f"expected a list of {len(kinds)} values, got {len(value)}: {_show(value)}"))
        return None
    return tuple(_convert(kind, item, f"{path}[{i}]", problems)
                 for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))  # fmt: skip


def _convert_dict(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.append((path, f"expected a block of keys, got {_show(value)}"))
        return None
    return {str(key): _convert(kind, item, f"{path}.{key}", problems) for key, item in value.items()}


def _convert_scalar(kind: type, value: Any, path: str, problems: Problems) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        if not math.isfinite(value):
            problems.append((path, f"expected a finite number, got {value}"))
        return float(value)
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    problems.append((path, f"expected {names[kind]}, got {_show(value)}"))
    return None


def _check_limits(bounds: Any, value: Any, path: str, problems: Problems) -> None:
    if not bounds or value is None:
        return
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_limits(bounds, item, f"{path}[{i}]", problems)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            _check_limits(bounds, item, f"{path}.{key}", problems)
        return
    if bounds["low"] is not None and value < bounds["low"]:
        problems.append((path, f"must be at least {bounds['low']}, got {value}"))
    if bounds["above"] is not None and value <= bounds["above"]:
        problems.append((path, f"must be above {bounds['above']}, got {value}"))
    if bounds["high"] is not None and value > bounds["high"]:
        problems.append((path, f"must be at most {bounds['high']}, got {value}"))


def _suggest(word: Any, options: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(option) for option in options], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return _suggest(path.name, [entry.name for entry in path.parent.glob("*.yaml")])


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _show(value: Any) -> str:
    """Kind and value, for a value of the wrong kind."""
    return "null" if value is None else f"{_kind(value)} {_value(value)}"


def _value(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
