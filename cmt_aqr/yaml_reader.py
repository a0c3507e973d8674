"""Reading YAML that a user wrote: only plain mappings, lists, text and numbers, in a file of sensible size.

What else YAML can do is refused, because a configuration has no use for it and each has a way to hang or crash a
program: aliases (a file of 1 kB can stand for 10 GB), tags, merge keys, nesting without end, numbers without end.
"""

import difflib
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cmt_aqr.errors import UserError

# Shipped configurations have 4 kB and nest 5 deep.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
# Characters of a number: more than any float64 or 64-bit integer needs.
MAX_NUMBER = 40
MAX_SHOWN = 60
_SHIPPED = Path(__file__).parents[1] / "configs"
_SUFFIXES = (".yaml", ".yml")


class ConfigError(UserError):
    """A configuration that cannot be used; ``str()`` lists every problem, one a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, deep nesting and duplicate keys; numbers as below."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError([f"line {line}: the alias *{show_key(event.anchor)} is not allowed, write the value out"])
        if event.tag is not None:
            raise ConfigError([f"line {line}: the tag {show_key(event.tag)} is not allowed, write a plain value"])
        if self.depth == MAX_DEPTH:
            raise ConfigError([f"line {line}: more than {MAX_DEPTH} levels of nesting"])
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise ConfigError(
                        [
                            f"key {show_value(key_node.value)} appears more than once in the block that starts at "
                            f"line {node.start_mark.line + 1}"
                        ]
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _number(kind: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_NUMBER:
            line, length = node.start_mark.line + 1, len(node.value)
            raise ConfigError([f"line {line}: a number of {length} characters, at most {MAX_NUMBER} are read"])
        # float() knows "inf" and "nan", which YAML writes with a dot.
        return kind(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))

    return construct


# The rules of YAML 1.2: 1e-4 is a number, 010 is ten, 10:20 is text, and so are dates and << (a merge key in YAML 1.1).
_INT = re.compile(r"^[-+]?[0-9]+(_[0-9]+)*$")
_FLOAT = re.compile(
    r"^[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.endswith((":bool", ":null"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule, _kind in (("int", _INT, int), ("float", _FLOAT, float)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _rule, list("-+0123456789."))
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number(_kind))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts text in quotes which the loader would take for a number, such as 1e5."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dump_yaml(tree: Any) -> str:
    """Nested dictionaries and lists as YAML text, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """YAML text as dictionaries, lists, text, numbers, booleans and None.

    Raises:
        ConfigError: one sentence on what is not YAML, or not allowed here.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        raise ConfigError([f"not valid YAML: character {error.position + 1} is {chr(error.character)!r}"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError([f"not valid YAML{where}: {_one_line(error.problem or error.context)}"]) from None


def find_config(path: str | Path) -> Path:
    """The file that a path or a bare name such as ``synthetic_tiny`` or ``ablation/v3`` means.

    A path that is no file is looked for in ``configs`` of the working folder, then in that of this project, with
    ``.yaml`` added where it is missing. Where nothing is found the path itself is returned.
    """
    path = Path(path)
    if path.is_absolute() or (path.exists() and not path.is_dir()):
        return path
    name = path if path.suffix in _SUFFIXES else path.with_name(f"{path.name}.yaml")
    found = (folder / name for folder in (Path("configs"), _SHIPPED))
    return next((file for file in found if file.is_file()), path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is no regular file, is too large, is not UTF-8, is not YAML, uses what is not
            allowed here, repeats a key, or is not a mapping.
    """
    try:
        text = _read_text(Path(path))
        tree = parse_yaml(text)
    except ConfigError as error:
        shown = str(path) if str(path).isprintable() else repr(str(path))
        raise ConfigError([f"{shown}: {problem}" for problem in error.problems]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: expected a mapping of keys, got {kind_of(tree)}"])
    return tree


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        # A pipe or a device would wait, or never end.
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ConfigError([f"expected a YAML file, this is {kind}"])
        if status.st_size > MAX_BYTES:
            raise ConfigError([f"{status.st_size} bytes are more than the {MAX_BYTES} of the largest configuration"])
        # utf-8-sig: some editors put a byte order mark in front.
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError([f"no such file{_similar_file(path)}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 text (byte {error.start + 1}): save the file as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"]) from None
    except ConfigError:
        raise
    except ValueError as error:  # a NUL in the path
        raise ConfigError([f"cannot be read: {error}"]) from None


def _similar_file(path: Path) -> str:
    """The configuration that a wrong path was probably meant for: the same name elsewhere, or a similar one beside."""
    local = Path("configs")
    folder = local if local.is_dir() else _SHIPPED
    name = path.stem if path.suffix in _SUFFIXES else path.name
    files: dict[str, Path] = {}
    for file in (*sorted(path.parent.glob("*.yaml")), *sorted(folder.rglob("*.yaml"))):
        files.setdefault(file.stem, file)
    near = difflib.get_close_matches(name, files, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {str(files[near[0]])!r}?"
    names = ", ".join(str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml")))
    return f"; the configurations in {folder} are {names}" if names and not path.is_absolute() else ""


def suggest(word: Any, options: Iterable[Any]) -> str:
    """The option that is most like a word, as the end of a sentence; empty when none is."""
    text = str(word) if isinstance(word, str | int | float | bool) else ""
    near = difflib.get_close_matches(text[: 2 * MAX_SHOWN], [str(option) for option in options], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def kind_of(value: Any) -> str:
    """The kind of a value in a word."""
    return "nothing" if value is None else type(value).__name__


def show(value: Any) -> str:
    """Kind and value, for a value of the wrong kind."""
    return "null" if value is None else f"{kind_of(value)} {show_value(value)}"


def show_value(value: Any) -> str:
    """A value, shortened."""
    try:
        text = "null" if value is None else repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        text = "(too large to print)"
    return _shorten(text)


def show_key(key: Any) -> str:
    """A key or a file name as it is, or in quotes where it has odd characters; shortened."""
    plain = isinstance(key, str) and key.isprintable() and key != ""
    return key if plain and len(key) <= 4 * MAX_SHOWN else _shorten(key if plain else repr(key))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _one_line(text: str | None) -> str:
    return " ".join(str(text).split())
