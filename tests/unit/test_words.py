"""Words that were replaced by the field's own do not come back, in code, messages and documentation."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("cmt_aqr", "configs", "docs", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".cfg", ".toml"}
# A word, as a regular expression -> what to write.
EVERYWHERE = {
    r"code ?planes?|(?:on|of|lie on) the plane": "packed coordinates",
    r"one behind the last": "end (exclusive)",
    r"runs? of blocks": "block range",
    r"num_clouds|LiDAR (?:clouds|turns)|--clouds": "sweeps",
    r"START_SPREAD": "INIT_STD",
    r"thinks? of a sensor": "per-query modality weight",
    r"(?:dead|live) (?:rows?|queries)": "padding, or valid, queries",
    r"(?:go|goes|going|went) on": "resume, continue",
    r"mend(?:s|ed|ing)?": "fix",
    r"by heart": "overfit",
    r"is said": "is printed, is logged",
    r"dear": "expensive",
    r"rooms": "packages",
    r"way of the data": "data flow",
    r"touch(?:es|ed)? (?:no|a|any|the) sensors?": "affect",
    r"in the place of": "instead of",
    r"looked? into": "inspect, record",
}
# The same for the package and the scripts alone.
IN_THE_PACKAGE = {
    r"(?:probe_)?figures": "metrics",
    r"nowhere": "NO_WINDOW, unused, no_voxel",
    r"touched": "partial, affected",
    r"(?:def |=)say": "log, write_line",
    r"names/parallel": "model/ddp_model",
}
# Fields' own words that begin alike, and tables of renamed keys.
ALLOWED = {
    "num_clouds": ("CHANGELOG.md",),
    "--clouds": ("CHANGELOG.md",),
    "figures": ("cmt_aqr/viz/", "cmt_aqr/tools/analyze.py", "cmt_aqr/golden/"),
}


def sources() -> list[Path]:
    """Text files of the project, without this one."""
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*"))]
    files += sorted(REPOSITORY.glob("*"))
    return [path for path in files if path.suffix in SUFFIXES and path != Path(__file__)]


def found(text: str, words: dict[str, str]) -> list[str]:
    """Line, word and replacement of each word in a text."""
    lines = text.splitlines()
    return [
        f"line {number}: {match[0]!r}, write: {better}"
        for word, better in words.items()
        for number, line in enumerate(lines, start=1)
        for match in re.finditer(rf"(?<![A-Za-z]){word}(?![A-Za-z])", line)
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_replaced_word_is_used(path):
    name = path.relative_to(REPOSITORY).as_posix()
    words = dict(EVERYWHERE)
    if name.startswith("cmt_aqr/") or name in ("train.py", "test.py"):
        words |= IN_THE_PACKAGE
    problems = found(path.read_text(encoding="utf-8"), words)
    allowed = [word for word, places in ALLOWED.items() if name.startswith(places)]
    assert [problem for problem in problems if not any(repr(word) in problem for word in allowed)] == []


def test_words_are_found_in_code_and_prose():
    text = "first, last  # one behind the last\nmessage = 'training goes on'\ntouched = goes_only = 1\n"
    assert len(found(text, EVERYWHERE)) == 2
    assert found(text, IN_THE_PACKAGE) == ["line 3: 'touched', write: partial, affected"]
    assert found("amend; undear; roomsize; a plane with walls", EVERYWHERE | IN_THE_PACKAGE) == []
