"""docs/quirks.md names tests that exist, and every fact."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| [QF]\d", line)
]


def test_every_named_test_exists():
    named = re.findall(r"`([\w/]+)::(\w+)`", PAGE)
    assert len(named) > 50
    missing = [
        f"{path}::{name}"
        for path, name in set(named)
        if not (file := ROOT / "tests" / f"{path}.py").is_file()
        or not re.search(rf"^def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []


def test_every_fact_has_a_row():
    facts = {fact for row in ROWS for fact in row[0].split(", ")}
    assert {f"Q{n}" for n in range(1, 18)} | {f"F{n}" for n in range(1, 35)} == facts


def test_rows_without_a_test_say_that_they_come_later():
    assert all(("::" in row[-1]) != (row[2] == "not in this version yet") for row in ROWS)


def test_every_fact_that_the_code_cites_has_a_row():
    cited = {
        fact
        for file in (ROOT / "cmt_aqr").rglob("*.py")
        for cites in re.findall(r"Quirks? ((?:Q\d+(?:, )?)+)", file.read_text(encoding="utf-8"))
        for fact in cites.rstrip(", ").split(", ")
    }
    assert cited and cited <= {fact for row in ROWS for fact in row[0].split(", ")}
