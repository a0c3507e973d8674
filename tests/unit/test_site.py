"""The pages of docs/ as a site (mkdocs.yml): every page has its place, and every link leads to a file."""

import re

import pytest
import yaml

from tests.parity.golden import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def leaves(nav) -> list[str]:
    """Files of a navigation, nested ones included."""
    found = []
    for entry in nav:
        for target in entry.values():
            found += [target] if isinstance(target, str) else leaves(target)
    return found


def test_every_page_is_in_the_navigation_once():
    nav = leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (DOCS / target).exists(), target
