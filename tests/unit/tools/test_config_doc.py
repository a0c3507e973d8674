"""docs/config.md follows from the schema, and every key has a meaning."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cmt_aqr.command_line import HelpConfig
from cmt_aqr.config import Config
from cmt_aqr.errors import UserError
from cmt_aqr.strict_yaml import limits
from cmt_aqr.tools import configs
from cmt_aqr.tools.config_doc import OFFICIAL, blocks, comments, explain, keys, page

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    number: float = limits(above=0, high=10_000)  # metres | feet
    # first line
    # second
    counts: tuple[tuple[int, int], ...] = limits(low=1, high=5, entries=(0, 3))  # third
    bare: bool


@dataclass(frozen=True)
class Outer:
    """The top."""

    choice: Literal["a", 1]  # one of two
    factors: dict[str, float] = limits(low=0)
    inner: Inner | None  # null: nothing


def test_the_page_is_what_the_schema_gives():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m cmt_aqr.tools.configs doc"


def test_every_key_has_a_meaning_and_every_official_name_a_key():
    found = {key.name: key.meaning for prefix, block in blocks(Config) for key in keys(block, prefix)}
    assert [name for name, meaning in found.items() if not meaning] == []
    assert [name for name in OFFICIAL if name not in found] == []
    assert len(found) > 130 and found["model.aqr.max_bias"] == "null: no clamp"


def test_a_page_of_a_small_schema():
    assert page(Outer, {"inner.number": "x.y"}).partition("## Top level\n\n")[2] == (
        "| key | takes | meaning | in CMT |\n|---|---|---|---|\n"
        "| `choice` | `a` `1` | one of two | |\n"
        "| `factors` | names with numbers, at least 0 | | |\n"
        "| `inner` | block or null | null: nothing | |\n"
        "\n## `inner`\n\nWhat is inside.\n\n"
        "| key | takes | meaning | in CMT |\n|---|---|---|---|\n"
        "| `inner.number` | number, above 0, up to 10 000 | metres \\| feet | x.y |\n"
        "| `inner.counts` | list of lists of 2 whole numbers, 0 to 3 entries, 1 to 5 | first line second third | |\n"
        "| `inner.bare` | true or false | | |\n"
    )


def test_comments_belong_to_the_field_below_or_before_them():
    source = "class A:\n    # no\n\n    # of x\n    x: int = f(\n        1,\n    )  # x too\n    y: str = '# no'\n# B\n"
    assert comments(source) == {"A": {"x": "of x x too", "y": ""}}


def test_the_command_writes_and_checks_the_page(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.md"

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["configs", "doc", *arguments, "--page", str(path)])
        return configs.main()

    assert run("--check") == 2 and not path.exists()
    assert capsys.readouterr().err == (
        f"error: {path}: is not what cmt_aqr/config.py gives; run python -m cmt_aqr.tools.configs doc\n"
    )
    assert run() == 0 and run("--check") == 0
    path.write_text(path.read_text().replace("metres", "feet", 1))
    assert run("--check") == 2


def test_one_key_is_explained_as_on_the_page():
    lines = explain("training.lr").splitlines()
    assert lines[0] == "training.lr" and lines[-1] == "  in CMT   optimizer.lr"
    assert lines[1] == "  takes    number, above 0, up to 10" and lines[2].startswith("  meaning  learning rate")
    assert explain("lr") == explain("training.lr")
    assert [text.splitlines()[0] for text in explain("activation_checkpointing").split("\n\n")] == [
        "model.activation_checkpointing",
        "model.camera.activation_checkpointing",
    ]
    assert "  takes    auto, flex, score_mod, dense, lowrank\n" in explain("backend")


def test_a_block_is_explained_with_all_its_keys():
    first, *rest = explain("model.attention").split("\n\n")
    assert first.startswith("model.attention: How the cross-attention")
    assert [text.splitlines()[0] for text in rest] == ["model.attention.backend", "model.attention.lowrank_energy"]


@pytest.mark.parametrize(
    ("wrong", "end"),
    [
        ("training.lrr", "did you mean 'training.lr'?"),
        ("lrr", "did you mean 'lr'?"),
        ("zzzzzz", "docs/config.md has all"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(wrong, end):
    with pytest.raises(UserError) as caught:
        explain(wrong)
    assert str(caught.value) == f"--help-config {wrong}: no such key; {end}"


def test_the_option_prints_and_ends(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--help-config", action=HelpConfig)
    for key, status in (("seed", 0), ("sead", 2)):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--help-config", key])
        assert stop.value.code == status
    printed = capsys.readouterr()
    assert printed.out.startswith("seed\n  takes    whole number")
    assert printed.err == "error: --help-config sead: no such key; did you mean 'seed'?\n"
