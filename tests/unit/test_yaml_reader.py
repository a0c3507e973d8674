"""Files that are no configuration: refused in one sentence, at once, whatever they hold."""

import os
import time
from pathlib import Path

import pytest

from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.yaml_reader import MAX_BYTES, dump_yaml, find_config, parse_yaml, read_yaml
from tests.parity.golden import REPOSITORY

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


@pytest.mark.parametrize("is_in_repository", [True, False])
def test_a_configuration_is_found_by_its_bare_name(tmp_path, monkeypatch, is_in_repository):
    monkeypatch.chdir(REPOSITORY if is_in_repository else tmp_path)
    assert [load_config(name).name for name in ("synthetic_tiny", "synthetic_tiny.yaml", "ablation/v3")] == [
        "synthetic_tiny",
        "synthetic_tiny",
        "ablation/v3",
    ]
    folder = "configs" if is_in_repository else str(REPOSITORY / "configs")
    with pytest.raises(ConfigError) as caught:
        load_config("synthetic_tiny", ("model.num_heads=7",))
    assert str(caught.value).startswith(f"{folder}/synthetic_tiny.yaml with --set model.num_heads=7: model.")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic_tiny").mkdir()
    assert find_config("synthetic_tiny") == REPOSITORY / "configs" / "synthetic_tiny.yaml"
    (tmp_path / "synthetic_tiny.yaml").write_text("name: own\n")
    assert find_config("synthetic_tiny.yaml") == Path("synthetic_tiny.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "synthetic_tiny.yaml").write_text("name: own\n")
    assert find_config("synthetic_tiny") == Path("configs/synthetic_tiny.yaml")
    assert find_config("/nowhere/synthetic_tiny.yaml") == Path("/nowhere/synthetic_tiny.yaml")


def test_a_wrong_name_is_answered_with_the_one_that_was_meant(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for wrong, right in (
        ("config/synthetic_tiny.yaml", "configs/synthetic_tiny.yaml"),
        ("configs/v3.yaml", "configs/ablation/v3.yaml"),
        ("synthetic_tinny", "configs/synthetic_tiny.yaml"),
        ("configs/synthetic_tinny.yaml", "configs/synthetic_tiny.yaml"),
        ("cmt_r50", "configs/cmt_r50_800x320.yaml"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(wrong)
        assert str(caught.value) == f"{wrong}: no such file; did you mean {right!r}?"
    with pytest.raises(
        ConfigError, match=r"^foo: no such file; the configurations in configs are ablation/baseline, .*"
    ):
        load_config("foo")
