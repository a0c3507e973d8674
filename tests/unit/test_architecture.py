"""docs/architecture.md names every module, and stays a page of two screens with a picture."""

import re
from fnmatch import fnmatch
from pathlib import Path

import cmt_aqr

PACKAGE = Path(cmt_aqr.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("## Packages") : PAGE.index("## Words")]
NAMES = set(re.findall(r"`([\w*/]+)`", TABLE))
# Packages whose files have a row of their own; of the others the purpose is enough.
LISTED = ("attention", "aqr", "models")


def test_every_module_is_named():
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    names |= {path.parent.name + "/" for path in PACKAGE.glob("*/__init__.py")}
    for folder in LISTED:
        names |= {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "evaluate"}
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in NAMES)} == set()


def test_every_name_exists():
    modules = {path.stem for path in PACKAGE.rglob("*.py")} | {
        path.name for path in PACKAGE.rglob("*") if path.is_dir()
    }
    rows = TABLE[: TABLE.index("`tests/")].splitlines()
    for name in re.findall(r"`([a-z_0-9/]+)`", "".join(row.split("|")[1] for row in rows if row.startswith("| "))):
        assert name.rstrip("/").rpartition("/")[2] in modules, name


def test_it_is_two_screens_with_a_picture():
    assert len(PAGE.splitlines()) <= 100
    picture = PAGE.split("```")[1]
    for stage in ("encode_images", "encode_points", "make_tokens", "make_queries", "aqr(", "decoder", "heads"):
        assert stage in picture
