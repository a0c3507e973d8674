"""Edits of YAML keep every other character, or are refused."""

import pytest
import yaml

from cmt_aqr.config import ConfigError
from cmt_aqr.tools.yaml_text import add_key, block_text, merge_text, merge_trees

TEXT = """\
# Top.
name: a   # the name

model:
  # about width
  width: 2.0e-4   # as published
  sizes: [1, 2,
          3]
  inner:
    - [1]
    - [2]

  # about aqr
  aqr: null

training:
  lr_mult: {}
  # the end of training
# the end
"""


def test_merge_replaces_values_and_keeps_the_rest():
    patch = (
        "name: b\nmodel:\n  width: 3\n  aqr:\n    size: 1.0e+2   # big\n    list: [1]\ntraining: {lr_mult: {x.y: 1}}\n"
    )
    with pytest.raises(ConfigError, match="cannot be edited as text"):
        merge_text("a: {b: 1}\n", "a:\n  c: 2\n")
    patch = patch.replace("training: {lr_mult: {x.y: 1}}", "training:\n  lr_mult: {x.y: 1}")
    assert merge_text(TEXT, patch) == (
        TEXT.replace("name: a ", "name: b ")
        .replace("width: 2.0e-4 ", "width: 3 ")
        .replace("  aqr: null\n", "  aqr:\n    size: 1.0e+2   # big\n    list: [1]\n")
        .replace("lr_mult: {}", "lr_mult: {x.y: 1}")
    )


def test_merge_puts_new_keys_last_also_where_blocks_end_together():
    text = "a:\n  b:\n    c: 1\n# note\nd: 2\n"
    patch = "a:\n  b:\n    x: 1\n    y: 2\n  z: 3\nd: 4\n"
    assert merge_text(text, patch) == "a:\n  b:\n    c: 1\n    x: 1\n    y: 2\n  z: 3\n# note\nd: 4\n"


def test_merge_replaces_lists_and_blocks_of_several_lines():
    text = merge_text(TEXT, "model:\n  sizes: [4]\n  inner: [5]\n")
    assert "  sizes: [4]\n  inner: [5]\n\n  # about aqr\n" in text
    assert yaml.safe_load(text) == merge_trees(yaml.safe_load(TEXT), {"model": {"sizes": [4], "inner": [5]}})


def test_merge_trees_leaves_its_arguments_alone():
    base, patch = {"a": {"b": 1}, "c": {}}, {"a": {"d": {"e": 2}}, "c": {"f": 3}}
    merged = merge_trees(base, patch)
    assert merged == {"a": {"b": 1, "d": {"e": 2}}, "c": {"f": 3}}
    merged["a"]["d"]["e"] = 9
    assert (base, patch) == ({"a": {"b": 1}, "c": {}}, {"a": {"d": {"e": 2}}, "c": {"f": 3}})


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ([], "model:\n  new: 1\n  # about width\n"),
        (["width"], "# as published\n  new: 1\n"),
        (["sizes"], "          3]\n  new: 1\n"),
        (["width", "inner"], "    - [2]\n  new: 1\n\n"),
        (["aqr", "absent"], "  aqr: null\n  new: 1\n\ntraining"),
    ],
)
def test_a_new_key_comes_after_the_last_of_its_siblings(before, line):
    text = add_key(TEXT, ("model", "new"), "1", before=before)
    assert line in text and text.replace("  new: 1\n", "") == TEXT


def test_new_keys_at_the_top_and_as_blocks():
    assert add_key(TEXT, ("new",), "1", before=[]) == TEXT.replace("name: a", "new: 1\nname: a")
    assert add_key(TEXT, ("new",), "1.0e-2", before=["training"], comment="why") == TEXT.replace(
        "lr_mult: {}\n", "lr_mult: {}\nnew: 1.0e-2   # why\n"
    )
    text = add_key(TEXT, ("model", "new"), "{a: 1, b: [2, 3], c: {d: x}}", before=["aqr"], comment="why")
    assert "  aqr: null\n  new:   # why\n    a: 1\n    b: [2, 3]\n    c:\n      d: x\n\n" in text


def test_a_value_is_one_value():
    assert "  new: 1 # x\n" in add_key(TEXT, ("model", "new"), "1 # x", before=[])
    assert "  new:\n    a: 1\n  # about" in add_key(TEXT, ("model", "new"), "a: 1", before=[])
    with pytest.raises(ConfigError, match="not valid YAML"):
        add_key(TEXT, ("model", "new"), "1\nname: b", before=[])


def test_a_block_in_braces_takes_no_key():
    with pytest.raises(ConfigError, match=r"training\.lr_mult is written in braces"):
        add_key(TEXT, ("training", "lr_mult", "x"), "1", before=[])


def test_a_block_as_a_text_of_its_own():
    assert block_text("a:\n  b:\n    # why\n    c: 1   # x\n    d:\n      e: 2\n\nf: 1\n", ("a", "b")) == (
        "# why\nc: 1   # x\nd:\n  e: 2\n"
    )
