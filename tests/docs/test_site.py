"""The site: every page is in its navigation, diagrams are those of the code, and the strict build passes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tools import diagrams
from tools.svg import CHARACTER

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
HAVE = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))


def test_diagrams_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["diagrams", "--check"])
    assert diagrams.main() == 0, "run: python -m tools.diagrams"
    monkeypatch.setattr(diagrams, "OUT", tmp_path)
    assert diagrams.main() == 1


@pytest.mark.parametrize("name", diagrams.DRAWINGS)
def test_nothing_is_drawn_outside_a_diagram(name: str) -> None:
    root = ElementTree.fromstring(str(diagrams.DRAWINGS[name]()))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert root.find(f"{SVG}title") is not None
    for text in root.iter(f"{SVG}text"):
        x, y, kinds = float(text.attrib["x"]), float(text.attrib["y"]), text.attrib["class"].split()
        wide = len(text.text or "") * CHARACTER * (0.92 if "small" in kinds else 1.0)
        left = x - (wide / 2 if "middle" in kinds else wide if "end" in kinds else 0)
        assert left >= 0 and left + wide <= width and 0 < y <= height, text.text


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {"index.md", "reference/commands.md"}  # both are made by tools/pages.py


def test_modules_of_the_reference_exist() -> None:
    for page in (ROOT / "docs/reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M):
            if importlib.util.find_spec("msd") and name.split(".")[-1][0].islower():
                assert importlib.util.find_spec(name) or hasattr(__import__("msd"), name.split(".")[-1]), name


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not HAVE, reason="the extra 'docs' is not installed")
def test_the_strict_build_passes_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "msd doctor" in (tmp_path / "reference/commands.html").read_text(encoding="utf-8")
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img)[^>]* src=\"https?:", text), page
        assert not re.search(r"<link[^>]*rel=\"stylesheet\"[^>]*href=\"https?:", text), page


@pytest.mark.slow
@pytest.mark.skipif(not HAVE, reason="the extra 'docs' is not installed")
def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    page = ROOT / "docs/limits.md"
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text(f"[a]({page.name}#nothing)", encoding="utf-8")
    nav = config.index("nav:\n")
    text = config[:nav].replace("docs_dir: docs", f"docs_dir: {docs}").replace("hooks: [tools/pages.py]\n", "")
    other = tmp_path / "mkdocs.yml"
    other.write_text(text.replace("site_dir: build/site", f"site_dir: {tmp_path}/site"), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(other)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "limits.md" in done.stdout + done.stderr
