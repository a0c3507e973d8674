"""Keep the configuration files together: the ablation's files, a new key in all files, and the page about all keys.

    python -m cmt_aqr.tools.configs ablation            # write configs/ablation/*.yaml from patches.yml
    python -m cmt_aqr.tools.configs ablation --check    # only compare; exit status 2 where they differ
    python -m cmt_aqr.tools.configs add model.dropout 0.1 --comment "of self-attention"
    python -m cmt_aqr.tools.configs doc                 # write docs/config.md from cmt_aqr/config.py; also --check

Comments and layout are kept. Either all files are written, or, where one would be wrong, none.
"""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMAND = "python -m cmt_aqr.tools.configs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ablation = commands.add_parser(
        "ablation",
        help="write configs/ablation/*.yaml from patches.yml",
        description="Write configs/ablation/*.yaml: each entry of patches.yml names the file it starts from and the "
        "values it changes.",
    )
    ablation.add_argument("--check", action="store_true", help="write nothing; exit status 2 where a file differs")
    add = commands.add_parser(
        "add",
        help="add a key to every file",
        description="Add a key to every configuration. The field must be in cmt_aqr/config.py already; files in which "
        "its block is null are left as they are and reported.",
    )
    add.add_argument("key", help="dotted, such as model.lidar.sparse_backend")
    add.add_argument("value", help="as YAML, such as 0.1, '[1, 2]' or '{a: 1, b: 2}' for a block of keys")
    add.add_argument("--after", metavar="KEY", help="put it after this key (default: as in cmt_aqr/config.py)")
    add.add_argument("--comment", default="", help="comment to write after the value")
    doc = commands.add_parser(
        "doc", help="write docs/config.md", description="Write the page about all keys from cmt_aqr/config.py."
    )
    doc.add_argument("--check", action="store_true", help="write nothing; exit status 2 where the page differs")
    doc.add_argument("--page", type=Path, default=Path("docs/config.md"), help="default: docs/config.md")
    for command in (ablation, add):
        command.add_argument("--configs", type=Path, default=Path("configs"), help="folder (default: configs)")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below

from cmt_aqr.config import Config, ConfigError, config_from_tree
from cmt_aqr.errors import report_errors
from cmt_aqr.files import atomic_path, write_bytes
from cmt_aqr.tools.config_doc import block_of, page
from cmt_aqr.tools.yaml_text import Keys, add_key, block_text, get, merge_text, tree_of
from cmt_aqr.yaml_reader import parse_yaml, read_yaml, suggest

PATCHES = "ablation/patches.yml"
Texts = dict[str, str]  # name of a configuration -> text of its file


def ablation_texts(patches: str, texts: Mapping[str, str], source: str = PATCHES) -> Texts:
    """The ablation's files.

    Args:
        patches: text of ``patches.yml``: entries with ``from``, ``about`` and ``set``.
        texts: the files that an entry may start from, by name.
        source: begins every problem.

    Raises:
        ConfigError: an entry has other keys, or starts from an unknown configuration.
    """
    made: Texts = {}
    for name, entry in tree_of(patches).items():
        _check_entry(name, entry, [*made, *texts], source)
        base = entry["from"]
        changes = block_text(patches, (name, "set")) if entry.get("set") else ""
        text = merge_text(made[base] if base in made else texts[base], f"name: ablation/{name}\n{changes}")
        made[name] = (
            f"# Ablation, {name}: {entry['about']}\n"
            f"# Generated from {base}.yaml and patches.yml by {COMMAND} ablation: do not edit.\n"
            f"{text[text.index('name:') :]}"
        )
    return {f"ablation/{name}": text for name, text in made.items()}


def _check_entry(name: str, entry: Any, bases: list[str], source: str) -> None:
    if not isinstance(entry, dict):
        raise ConfigError([f"{source}: {name}: expected a block with from, about and set"])
    for key in ("from", "about"):
        if not isinstance(entry.get(key), str):
            raise ConfigError([f"{source}: {name}.{key}: expected text, got {entry.get(key)!r}"])
    for key in entry:
        if key not in ("from", "about", "set"):
            raise ConfigError([f"{source}: {name}.{key}: unknown key{suggest(key, ('from', 'about', 'set'))}"])
    if entry["from"] not in bases:
        near = suggest(entry["from"], bases)
        raise ConfigError([f"{source}: {name}.from: {entry['from']!r} is no entry above and no configuration{near}"])
    if not isinstance(entry.get("set", {}), dict):
        raise ConfigError([f"{source}: {name}.set: expected a block of keys, got {entry['set']!r}"])


def read_texts(folder: Path) -> tuple[Texts, str]:
    """The files below a folder that are not generated, by name, and the text of ``patches.yml``."""
    paths = [path for path in sorted(folder.rglob("*.yaml")) if path.parent != (folder / PATCHES).parent]
    if not paths or not (folder / PATCHES).is_file():
        raise ConfigError([f"{folder}: expected a folder with configurations and {PATCHES}: run in the repository"])
    for path in (*paths, folder / PATCHES):
        read_yaml(path)  # raises the error of a damaged YAML file
    texts = {path.relative_to(folder).with_suffix("").as_posix(): _read(path) for path in paths}
    return texts, _read(folder / PATCHES)


def changed_ablation(folder: Path) -> Texts:
    """New text of the ablation's files that differ from their entries, by path below the folder.

    Raises:
        ConfigError: a file has no entry, or an entry does not give a valid configuration.
    """
    texts, patches = read_texts(folder)
    made = ablation_texts(patches, texts, str(folder / PATCHES))
    for name, text in made.items():
        config_from_tree(tree_of(text), f"{folder / PATCHES}: {Path(name).name}")
    return _differing(folder, made)


def check_ablation(folder: Path) -> None:
    """Raise ConfigError that lists every file of the ablation that differs from its entry."""
    _refuse(folder, changed_ablation(folder))


def _differing(folder: Path, made: Texts) -> Texts:
    for path in sorted((folder / PATCHES).parent.glob("*.yaml")):
        if f"ablation/{path.stem}" not in made:
            raise ConfigError([f"{path}: has no entry in {folder / PATCHES}: add one, or remove the file"])
    files = {f"{name}.yaml": text for name, text in made.items()}
    return {file: text for file, text in files.items() if not (folder / file).is_file() or _read(folder / file) != text}


def _refuse(folder: Path, differing: Texts) -> None:
    if differing:
        raise ConfigError(
            [f"{folder / file}: is not what {PATCHES} gives; run {COMMAND} ablation" for file in differing]
        )


def with_new_key(
    folder: Path, key: str, value: str, *, after: str | None = None, comment: str = ""
) -> tuple[Texts, list[str]]:
    """Every file with a new key.

    Args:
        folder: the configurations; the ablation's files are generated again.
        key: dotted; a field of the schema in ``cmt_aqr/config.py``.
        value: as YAML.
        after: dotted; the key to put it after. Default: the field before it in the schema.
        comment: after the value, in every file.

    Returns:
        Changed files by path below the folder, and names of files whose block is null.

    Raises:
        ConfigError: the key is not a field of the schema or is in a file already, the value is wrong, or a file cannot
            be edited as text.
    """
    keys = tuple(key.split("."))
    before = _fields_before(keys, after)
    if not comment.isprintable():
        raise ConfigError([f"--comment: expected one line of text, got {comment!r}"])
    bases, old_patches = read_texts(folder)
    old_ablation = ablation_texts(old_patches, bases, str(folder / PATCHES))
    _refuse(folder, _differing(folder, old_ablation))
    old = bases | old_ablation
    has_block = {name: _has_block(tree_of(text), keys, f"{folder / name}.yaml") for name, text in old.items()}
    for name, text in bases.items():
        if has_block[name]:
            bases[name] = add_key(text, keys, value, before=before, comment=comment)
    patches = _add_to_patches(old_patches, old, keys, value, before, comment)
    new = bases | ablation_texts(patches, bases)
    for name, text in new.items():
        if has_block[name]:
            _check_added(old[name], text, keys, value, f"{folder / name}.yaml")
    files = {f"{name}.yaml": text for name, text in new.items() if text != old[name]}
    files |= {PATCHES: patches} if patches != old_patches else {}
    return files, [f"{name}.yaml" for name in new if not has_block[name]]


def _fields_before(keys: Keys, after: str | None) -> list[str]:
    """Fields of the schema that come before a key in its block, or the one that ``--after`` names."""
    schema: Any = Config
    for depth, key in enumerate(keys):
        names = [field.name for field in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []
        if key not in names:
            where = f"{schema.__name__} in cmt_aqr/config.py" if names else "the schema, which ends above it"
            raise ConfigError(
                [f"{'.'.join(keys[: depth + 1])}: no field of {where}: add the field first{suggest(key, names)}"]
            )
        schema = block_of(typing.get_type_hints(schema)[key])
    if after is None:
        return names[: names.index(keys[-1])]
    *parent, sibling = after.split(".")
    if tuple(parent) != keys[:-1] or sibling not in names or sibling == keys[-1]:
        raise ConfigError([f"--after {after}: expected a key of the same block as {'.'.join(keys)}"])
    return [sibling]


def _has_block(tree: Any, keys: Keys, source: str) -> bool:
    """Whether the block that holds a key is there; False where it is null."""
    for depth, key in enumerate(keys[:-1]):
        if tree is None:
            return False
        if key not in tree:
            raise ConfigError([f"{source}: {'.'.join(keys[: depth + 1])}: missing key"])
        tree = tree[key]
    if tree is not None and keys[-1] in tree:
        raise ConfigError([f"{source}: {'.'.join(keys)}: is there already"])
    return tree is not None


def _add_to_patches(patches: str, texts: Texts, keys: Keys, value: str, before: list[str], comment: str) -> str:
    """Add the key to the entries that set a block which is null in the file they start from."""
    entries = tree_of(patches)
    for name, entry in entries.items():
        base = f"ablation/{entry['from']}" if entry["from"] in entries else entry["from"]
        is_made = isinstance(get(entry.get("set"), keys[:-1]), dict)
        if is_made and get(tree_of(texts[base]), keys[:-1]) is None:
            patches = add_key(patches, (name, "set", *keys), value, before=before, comment=comment)
    return patches


def _check_added(old: str, new: str, keys: Keys, value: str, source: str) -> None:
    """Check that the new text is the old one with the key, and that the key brings no problem."""
    expected = tree_of(old)
    get(expected, keys[:-1])[keys[-1]] = parse_yaml(value)
    if tree_of(new) != expected:
        raise ConfigError([f"{source}: would differ by more than {'.'.join(keys)}: add it by hand"])
    found = set(_problems(new, source)) - set(_problems(old, source))
    if found:
        raise ConfigError(sorted(found))


def _problems(text: str, source: str) -> tuple[str, ...]:
    try:
        config_from_tree(tree_of(text), source)
    except ConfigError as error:
        return error.problems
    return ()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _write(folder: Path, files: Texts) -> None:
    for file, text in files.items():
        with atomic_path(folder / file) as temporary:
            write_bytes(temporary, text.encode())
        print(f"wrote {folder / file}")


def run(options: argparse.Namespace) -> int:
    """Run a sub-command; returns the exit status."""
    if options.command == "doc":
        _run_doc(options)
        return 0
    folder = options.configs
    if options.command == "add":
        files, skipped = with_new_key(folder, options.key, options.value, after=options.after, comment=options.comment)
        _write(folder, files)
        block = options.key.rpartition(".")[0]
        if skipped:
            print(f"{block} is null, so the key is not in: {', '.join(skipped)}")
    elif options.check:
        check_ablation(folder)
    else:
        _write(folder, changed_ablation(folder))
    return 0


def _run_doc(options: argparse.Namespace) -> None:
    is_same = options.page.is_file() and _read(options.page) == page()
    if options.check and not is_same:
        raise ConfigError([f"{options.page}: is not what cmt_aqr/config.py gives; run {COMMAND} doc"])
    if not is_same:
        _write(options.page.parent, {options.page.name: page()})


def main() -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args()
    return report_errors(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
