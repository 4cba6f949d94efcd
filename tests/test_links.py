"""Checks links, anchors and file names of the Markdown pages, and their generated tables against the result files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tools import tables

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "recipes").rglob("*.md")), *sorted((ROOT / "src").rglob("*.md"))]
FOLDERS = ("docs", "recipes", "results", "src", "tests", "tools", "weights")
FILES = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
EXAMPLES = {"gated.py"}  # files that a page tells its reader to write


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def links(page: Path) -> list[str]:
    """The relative targets of links and pictures."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def broken(page: Path) -> list[str]:
    """Links to a file or a heading that does not exist."""
    wrong = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def missing(page: Path) -> list[str]:
    """File names in `code` that no file of the repository has; a name may omit the first folders of the path."""
    names = re.findall(r"`([\w./-]+\.(?:py|md|json|toml|png|safetensors))(?::[^`]*)?`", prose(page))
    return [name for name in names if name not in EXAMPLES and not any(f.endswith(f"/{name}") for f in FILES)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    assert missing(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: `x`\n[a](gone.md) [b](#no-title) [c](#a-title-x) [d](https://x.y)\n```\n[e](code.md)\n```\n"
    )
    assert broken(page) == ["gone.md", "#no-title"]
    page.write_text("`core/tree.py` and `core/forest.py`")
    assert missing(page) == ["core/forest.py"]


def test_tables_agree_with_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 0, "run: python tools/tables.py"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
