"""Output on terminals and pipes of any width and encoding: spells out characters that the encoding lacks."""

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
    """Makes stdout and stderr spell out what their encoding lacks, such as "tau" for τ, instead of raising."""
    codecs.register_error("msd.spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None, or another class, if a program has replaced it
            stream.reconfigure(errors="msd.spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell, error.object[error.start : error.end])), error.end


def _spell(character: str) -> str:
    """Returns ASCII: a similar sign from `SPELLED`, the name of a Greek letter, or else the character's number."""
    if character in SPELLED:
        return SPELLED[character]
    kind, _, letter = unicodedata.name(character, "").partition(" LETTER ")
    if kind.startswith("GREEK") and letter.isalpha():
        return letter.lower()
    return character.encode("ascii", "backslashreplace").decode()


def flush() -> None:
    """Flushes stdout and stderr, so that an error occurs here and not when the interpreter exits."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def give_up_output() -> None:
    """Redirects stdout to the null device, after its reader has left or its disk is full."""
    with suppress(AttributeError, OSError, ValueError):  # stdout is not a file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def status(text: str) -> Status:
    """Returns a spinner with a text for stderr, to be used in a `with` block; shows nothing without a terminal."""
    console = Console(file=sys.stderr)
    return console.status(text, spinner="dots" if console.encoding.startswith("utf") else "line")


def loading() -> Status:
    """Returns the spinner for loading a model."""
    return status("loading the model (an embedded one is assembled at first use, half a minute)…")


def table(*heads: str, wrapped: Sequence[str] = ()) -> Table:
    """Returns an empty table that fits 80 columns without cutting a cell.

    heads: column heads; they break only at the line breaks given. wrapped: heads of the columns whose text may wrap.
    """
    columns = [Column(head, no_wrap=head not in wrapped, overflow="fold") for head in heads]
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
