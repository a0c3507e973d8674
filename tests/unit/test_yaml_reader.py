"""Files that are no configuration: refused in one sentence, at once, whatever they hold."""

import os
import time
from pathlib import Path

import pytest

from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.yaml_reader import MAX_BYTES, dump_yaml, parse_yaml, read_yaml

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


def sentence(path: Path) -> str:
    """The one sentence that reading a file ends in, less its name."""
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert time.perf_counter() - start < 5
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB, "line 2: the alias *a is not allowed, write the value out"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "line 2: the alias *a is not allowed, write the value out"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 1: more than 20 levels of nesting"),
        ("a: " + "{a: " * 3000, "line 1: more than 20 levels of nesting"),
        ("\n".join(" " * i + "a:" for i in range(400)), "line 20: more than 20 levels of nesting"),
        ("a: " + "9" * 400, "line 1: a number of 400 characters, at most 40 are read"),
        ("a: 1." + "9" * 5000, "line 1: a number of 5002 characters, at most 40 are read"),
        ("a: !!binary aGVsbG8=", "line 1: the tag tag:yaml.org,2002:binary is not allowed, write a plain value"),
        ("a: !!set {x}", "line 1: the tag tag:yaml.org,2002:set is not allowed, write a plain value"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag tag:yaml.org,2002:python/object/apply:os.system "
         "is not allowed, write a plain value"),
        ("a: !!int x", "line 1: the tag tag:yaml.org,2002:int is not allowed, write a plain value"),
        ("a: 1\n---\nb: 1\n", "not valid YAML at line 2: but found another document"),
        ("a: 1\x00", "not valid YAML: character 5 is '\\x00'"),
        ("a:\n\t- 1\n", "not valid YAML at line 2: found character '\\t' that cannot start any token"),
        ("? [a]\n: 1\n", "not valid YAML at line 1: found unhashable key"),
        ("a: 1\n'a': 2\n", "key 'a' appears more than once in the block that starts at line 1"),
        ("a: 1\n".encode("utf-16"), "not UTF-8 text (byte 1): save the file as UTF-8"),
        (b"a: \xe9\n", "not UTF-8 text (byte 4): save the file as UTF-8"),
        ("", "expected a mapping of keys, got nothing"),
        ("\n# nothing\n", "expected a mapping of keys, got nothing"),
        ("text", "expected a mapping of keys, got str"),
        ("a: 1\n" * 100_000, f"500000 bytes are more than the {MAX_BYTES} of the largest configuration"),
    ],
)  # fmt: skip
def test_content(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence(path) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("-.5", -0.5), ("10_000", 10000), ("010", 10), ("1.", 1.0), (".inf", float("inf")),
        ("10:20", "10:20"), ("2024-01-01", "2024-01-01"), ("<<", "<<"), ("0b_", "0b_"), ("0x", "0x"), ("=", "="),
        ("null", None), ("true", True), ("'1e5'", "1e5"), ("+3", 3), ("1__0", "1__0"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_plain_values(text, value):
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)
    assert parse_yaml(dump_yaml([value])) == [value]


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "mark.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == {"a": 1}


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert sentence(tmp_path) == "expected a YAML file, this is a folder"
    assert sentence(tmp_path / "pipe") == "expected a YAML file, this is no regular file"
    assert sentence(Path("/dev/zero")) == "expected a YAML file, this is no regular file"
    assert sentence(tmp_path / ("a" * 300)) == "cannot be read: File name too long"
    with pytest.raises(ConfigError, match="embedded null"):
        read_yaml("a\0b.yaml")


def test_a_configuration_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    for wrong, right in (
        ("synthetic_tiny", "configs/synthetic_tiny.yaml"),
        ("synthetic_tiny.yaml", "configs/synthetic_tiny.yaml"),
        ("config/synthetic_tiny.yaml", "configs/synthetic_tiny.yaml"),
        ("configs/v3.yaml", "configs/ablation/v3.yaml"),
        ("ablation/v3", "configs/ablation/v3.yaml"),
        ("synthetic_tinny", "configs/synthetic_tiny.yaml"),
        ("configs/synthetic_tinny.yaml", "configs/synthetic_tiny.yaml"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(wrong)
        assert str(caught.value) == f"{wrong}: no such file; did you mean {right!r}?"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such file; did you mean '.*configs/synthetic_tiny\.yaml'\?$"):
        load_config("synthetic_tiny")
