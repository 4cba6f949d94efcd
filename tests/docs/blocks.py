"""The code blocks of the pages, and the comments that say how the tests use them.

A comment `<!-- block: … -->` on the line above a block says one of

    parsed, REASON                 only its syntax and its options are checked
    tested by FILE                 a test of its own runs it
    "A" -> "B", "C" -> "D"         it is run with these words in place of others

A block of Python or shell without a comment is run as it is.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(
    r"^(?:(?P<pad> *)<!-- block: (?P<mark>.*?) -->\n)?(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^ *```$",
    re.S | re.M,
)
PAIR = re.compile(r'"((?:[^"\\]|\\.)*)" -> "((?:[^"\\]|\\.)*)"')
PARSED, TESTED = "parsed, ", "tested by "


@dataclass(frozen=True)
class Block:
    """One block. line: of its first line of code. mark: the text of its comment, or ""."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the test runs it."""
        return self.language in ("python", "bash") and not self.mark.startswith((PARSED, TESTED))

    def replaced(self) -> str:
        """The text to run; AssertionError for a word that the block does not have."""
        text = self.text
        for old, new in self.pairs():
            assert old in text, f"{self.name}: '{old}' is not in the block"
            text = text.replace(old, new)
        return text

    def pairs(self) -> list[tuple[str, str]]:
        """The words to replace."""
        if not self.mark or not self.runs:
            return []
        pairs = PAIR.findall(self.mark)
        assert pairs and PAIR.sub("", self.mark).replace(",", "").strip() == "", f"{self.name}: {self.mark}"
        return [(old.replace('\\"', '"'), new.replace('\\"', '"')) for old, new in pairs]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        code = "".join(part.removeprefix(match["indent"]) for part in match["text"].splitlines(keepends=True))
        found.append(Block(page, line, match["language"], code, match["mark"] or ""))
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | & ?(?=\w+=|$)", re.sub(r"(^|\s)#.*", "", line)):
            words = [word for word in shlex.split(part) if word != "…"]
            while words and re.fullmatch(r"\w+=\$?\S*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found
