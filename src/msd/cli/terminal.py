"""Output on terminals and in pipes of any width and encoding: what cannot be written as it is, is spelled out."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Column, Table

SPELLED = {
    "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": "*", "²": "2", "‘": "'", "’": "'", "“": '"', "”": '"',
    "≤": "<=", "≥": ">=", "→": "->", "µ": "u",
}  # fmt: skip


def any_encoding() -> None:
    """Has stdout and stderr spell out what their encoding lacks, such as "tau" for τ, instead of raising."""
    codecs.register_error("msd.spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None, or anything, where a program has put its own
            stream.reconfigure(errors="msd.spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell, error.object[error.start : error.end])), error.end


def _spell(character: str) -> str:
    """In ASCII: a few signs by their looks, Greek letters by their names, others by their numbers."""
    if character in SPELLED:
        return SPELLED[character]
    kind, _, letter = unicodedata.name(character, "").partition(" LETTER ")
    if kind.startswith("GREEK") and letter.isalpha():
        return letter.lower()
    return character.encode("ascii", "backslashreplace").decode()


def flush() -> None:
    """Writes out what is still held back, so that an error in it is met here and not at the interpreter's end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def give_up_output() -> None:
    """Has nothing more written to stdout, whose reader is gone or whose disk is full."""
    with suppress(AttributeError, OSError, ValueError):  # a stdout that is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def status(text: str) -> Status:
    """A spinner on stderr beside `text`, while its block runs; without a terminal nothing is shown."""
    console = Console(file=sys.stderr)
    return console.status(text, spinner="dots" if console.encoding.startswith("utf") else "line")


def loading() -> Status:
    """The spinner while a model loads; an embedded one is put together when it is first used."""
    return status("loading the model (an embedded one is put together once, half a minute)…")


def table(*heads: str, wrapped: Sequence[str] = ()) -> Table:
    """An empty table that fits 80 columns with every cell whole.

    heads: of the columns, with line breaks where they may be broken; a name or number never is. wrapped: heads of the
    columns whose text may take several lines.
    """
    columns = [Column(head, no_wrap=head not in wrapped, overflow="fold") for head in heads]
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
