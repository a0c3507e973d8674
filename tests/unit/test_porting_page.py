"""docs/porting.md names functions, tensors, settings and facts that exist, and all of a bundle's tensors."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from cmt_aqr.golden.catalogue import ENTRIES, describe
from tests.unit.golden.make_tiny import FOLDER

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))


@cache
def definitions(path):
    """Functions, classes, `Class.method` and constants of a file; empty where there is none."""
    file = ROOT / "cmt_aqr" / path
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("path", "name"), FUNCTIONS)
def test_a_named_function_exists(path, name):
    assert name in definitions(path)


def test_many_functions_are_named():
    assert len(FUNCTIONS) > 50
    assert "no_such_function" not in definitions("geometry.py") and definitions("no_such_file.py") == set()


def test_every_tensor_of_a_bundle_is_on_the_page_and_no_other():
    stages = "|".join({entry.names.partition("/")[0] for entry in ENTRIES})
    named = {name for name in re.findall(rf"(?<![\w./])((?:{stages})/[\w.*]*[\w*])", PAGE) if ".py" not in name}
    assert [name for name in named if describe(name) is None and not name.endswith("/*")] == []
    assert {entry.names for entry in ENTRIES} - {describe(name).names for name in named if describe(name)} == set()


def test_every_fact_of_the_model_is_on_the_page_and_has_a_row():
    quirks = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
    rows = {fact for row in re.findall(r"^\| ([QF][\d, QF]+) \|", quirks, re.MULTILINE) for fact in row.split(", ")}
    cited = set(re.findall(r"\b[QF]\d+\b", PAGE))
    assert cited <= rows
    assert {f"Q{n}" for n in range(1, 18)} <= cited


def test_every_setting_that_a_port_reads_is_in_the_manifest():
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    (text,) = re.findall(r"^Read from the manifest.*?^$", PAGE, re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([\w.]+)`", text)
    known = {*manifest["constants"], *manifest["config"]["model"]["aqr"], "config.model.aqr"}
    assert {name.removeprefix("constants.") for name in named} <= known
    assert set(manifest["constants"]) - {"classes", "cameras"} <= {name.removeprefix("constants.") for name in named}


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
