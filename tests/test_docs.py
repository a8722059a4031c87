"""The pages: no long line of prose, no link that leads nowhere, no page that the site leaves out."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "plans/**/*.md", "tests/data/README.md") for page in ROOT.glob(pattern)
)
LONGEST = 120
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
LONE_LINK = re.compile(r"\s*(?:[*-] )?!?\[[^\]]*\]\([^)]*\)\S?\s*")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> list[tuple[int, str]]:
    """The numbered lines of a page that are neither code, tables nor a link alone."""
    lines, is_fenced = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced and not line.startswith(("    ", "|")) and not LONE_LINK.fullmatch(line):
            lines.append((number, line))
    return lines


def broken_rows(text: str) -> list[int]:
    """Rows of tables that were filled like prose."""
    return [number for number, line in prose(text) if " | " in re.sub(r"`[^`]*`", "", line)]


def long_lines(text: str) -> list[int]:
    return [number for number, line in prose(text) if len(line) > LONGEST]


def links(text: str) -> list[str]:
    """The targets of a page's relative links and pictures, those in its tables too."""
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [target for target in LINK.findall(without_code) if not re.match(r"[a-z]+:", target)]


def anchor_of(heading: str) -> str:
    """As Git hosts make it of a heading; `make docs` holds that the site's are the same."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", words))


@cache
def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target in links(text):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


def pages_in(nav: Any) -> list[str]:
    """The files that a nav names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_of_prose_is_long(page):
    assert long_lines(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_row_of_a_table_has_a_line(page):
    assert broken_rows(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_between_pages_leads_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_every_page_is_in_the_nav_of_the_site():
    nav = pages_in(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_checks_find_what_is_wrong():
    long = "word " * 30
    assert long_lines(f"{long}\n\n    {long}\n| {long} |\n```\n{long}\n```\n* {long}\n") == [1, 8]
    assert broken_rows("| a | b |\n| - | - |\n| c\nd | e |\n`f | g`\n") == [4]
    page = DOCS / "privacy.md"
    right = "[a](tutorial.md) [b](tutorial.md#plan) [c](https://example.org) `[d](code.md)`"
    assert dead_links(page, right) == []
    wrong = "[a](nowhere.md) [b](tutorial.md#nowhere) ![c](images/nothing.png)"
    assert dead_links(page, wrong) == ["nowhere.md", "tutorial.md#nowhere", "images/nothing.png"]
    assert pages_in([{"A": "a.md"}, {"B": ["b.md", {"C": "c.md"}]}]) == ["a.md", "b.md", "c.md"]
