"""Edit YAML as text, so that comments and layout are kept: set values, add a key.

PyYAML's nodes give the line and column of each key and value; only those places change. Every edit is checked: the new
text must be read as the old tree with the intended change.
"""

import copy
import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from cmt_aqr.yaml_reader import ConfigError, parse_yaml

# (first line, line after the last, new lines)
_Edit = tuple[int, int, list[str]]
Keys = tuple[str, ...]


def tree_of(text: str) -> Any:
    """The tree that a text is read as; cached, because the same texts are read repeatedly."""
    return copy.deepcopy(_parsed(text))


_parsed = functools.lru_cache(maxsize=200)(parse_yaml)


def merge_trees(base: Any, patch: Any) -> Any:
    """A tree in which the patch's values replace those of the base; blocks of keys are merged."""
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    return base | {key: merge_trees(base.get(key), value) for key, value in patch.items()}


def merge_text(base: str, patch: str) -> str:
    """The text ``base`` with the values of the text ``patch``, as :func:`merge_trees`; new keys come last in a block.

    Raises:
        ConfigError: the text cannot be edited in this way, such as a list or block in braces that gains a key.
    """
    expected = merge_trees(tree_of(base), tree_of(patch))
    edits: list[_Edit] = []
    lines = base.splitlines()
    _merge(_compose(base), _compose(patch), lines, patch.splitlines(), edits)
    return _checked(_apply(lines, edits), expected)


def get(tree: Any, keys: Keys) -> Any:
    """The value at a key; None where it, or a block around it, is null or absent."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def add_key(text: str, keys: Keys, value: str, *, before: Sequence[str], comment: str = "") -> str:
    """Add a key to a block.

    Args:
        text: YAML whose block ``keys[:-1]`` exists and does not hold the key yet.
        value: the value as YAML; a block of keys is written one a line.
        before: keys of the same block; the new one comes after the last of them that the block holds, else first.
        comment: follows the value.

    Raises:
        ConfigError: the text cannot be edited in this way.
    """
    added: Any = parse_yaml(value)
    expected = tree_of(text)
    get(expected, keys[:-1])[keys[-1]] = added
    lines, block, indent = text.splitlines(), _compose(text), 0
    first = block.value[0][0].start_mark.line
    for key in keys[:-1]:
        name, block = next(entry for entry in block.value if entry[0].value == key)
        first, indent = name.start_mark.line + 1, block.start_mark.column
        if not isinstance(block, yaml.MappingNode) or block.flow_style:
            raise ConfigError([f"{'.'.join(keys[:-1])} is written in braces: write it as a block, one key a line"])
    at = max((_end(name, node) for name, node in block.value if name.value in before), default=first)
    new = _block_lines(keys[-1], added) if isinstance(added, dict) and added else [f"{keys[-1]}: {value}"]
    new[0] += f"   # {comment}" if comment else ""
    return _checked(_apply(lines, [(at, at, [" " * indent + line for line in new])]), expected)


def block_text(text: str, keys: Keys) -> str:
    """The block of keys below a key, as a separate text."""
    block = _compose(text)
    for key in keys:
        name, block = next(entry for entry in block.value if entry[0].value == key)
    return "\n".join(_reindented_lines(text.splitlines()[name.start_mark.line + 1 : _end(name, block)], 0)) + "\n"


def _block_lines(key: str, value: Any) -> list[str]:
    """A key and its value, blocks of keys with one key a line, lists on one line."""
    if not isinstance(value, dict) or not value:
        return [f"{key}: {yaml.safe_dump([value], default_flow_style=True, width=10**6)[1:-2]}"]
    return [f"{key}:", *(f"  {line}" for name, item in value.items() for line in _block_lines(name, item))]


@functools.lru_cache(maxsize=200)
def _compose(text: str) -> yaml.MappingNode:
    node = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(["expected a mapping of keys"])
    return node


def _end(name: yaml.Node, value: yaml.Node) -> int:
    """The line after the last one of an entry; PyYAML's end mark of a block lies after the comments that follow it."""
    if isinstance(value, yaml.ScalarNode) or value.flow_style or not value.value:
        return max(name.end_mark.line, value.end_mark.line) + 1
    last = value.value[-1]
    return _end(*last) if isinstance(value, yaml.MappingNode) else _end(last, last)


def _merge(
    base: yaml.MappingNode, patch: yaml.MappingNode, lines: list[str], patch_lines: list[str], edits: list[_Edit]
) -> None:
    """Collect the edits of a block."""
    entries = {name.value: (name, value) for name, value in base.value}
    indent = base.value[0][0].start_mark.column
    added: list[str] = []
    for name, value in patch.value:
        if name.value not in entries:
            added += _reindented(name, value, patch_lines, indent)
            continue
        old_name, old = entries[name.value]
        both = isinstance(old, yaml.MappingNode) and isinstance(value, yaml.MappingNode)
        if both and not old.flow_style and not value.flow_style:
            _merge(old, value, lines, patch_lines, edits)
        elif old_name.start_mark.line == old.end_mark.line and name.start_mark.line == value.end_mark.line:
            line, new = lines[old.start_mark.line], patch_lines[value.start_mark.line]
            new = new[value.start_mark.column : value.end_mark.column]
            line = line[: old.start_mark.column] + new + line[old.end_mark.column :]
            edits.append((old.start_mark.line, old.start_mark.line + 1, [line]))
        else:
            edits.append((old_name.start_mark.line, _end(old_name, old), _reindented(name, value, patch_lines, indent)))
    if added:
        end = _end(*base.value[-1])
        edits.append((end, end, added))


def _reindented(name: yaml.Node, value: yaml.Node, lines: list[str], indent: int) -> list[str]:
    """An entry's lines, moved to another indentation."""
    return _reindented_lines(lines[name.start_mark.line : _end(name, value)], indent)


def _reindented_lines(lines: list[str], indent: int) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), " " * indent).splitlines()


def _apply(lines: list[str], edits: list[_Edit]) -> str:
    """Apply edits from the last line to the first; of those at the same line, the last one first."""
    lines = list(lines)
    for _, (first, end, new) in sorted(enumerate(edits), key=lambda item: (item[1][:2], item[0]), reverse=True):
        lines[first:end] = new
    return "\n".join(lines) + "\n"


def _checked(text: str, expected: Any) -> str:
    if tree_of(text) != expected:
        raise ConfigError(["cannot be edited as text: write its blocks one key a line, and lists on one line"])
    return text
