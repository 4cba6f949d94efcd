"""Files of the user: opened with care, or written whole or not at all."""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from msd.errors import UserError


@contextmanager
def open_regular(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes. name: what to call it, kind: what it should be, in messages.

    UserError: a URL, no such file, a folder, a device, or not readable.
    """
    text = os.fsdecode(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2}|data:", text):
        raise UserError(f"{name} is a URL, and fetching is off; save the {kind} and give its path")
    if not text:
        raise UserError(f"the path of the {kind} is empty; give the path of one")
    try:
        path = Path(text)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{name} is {found}; give the path of a file")
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {name}; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}; check the path") from error
    with file:
        yield file


@contextmanager
def open_media(source: str | os.PathLike[str], name: str, kind: str) -> Iterator[BinaryIO]:
    """As `open_regular`; also the bytes that a `data:` URI holds, and the file that a `file:` URL names."""
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        yield io.BytesIO(_data(text, name))
        return
    url = urlsplit(text) if text[:7].lower() == "file://" else None
    local = url2pathname(url.path) if url is not None and url.netloc in ("", "localhost") else text
    with open_regular(local, name, kind) as file:
        yield file


def _data(uri: str, name: str) -> bytes:
    """The bytes of `data:[type][;base64],…` (RFC 2397), with or without padding."""
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        data = unquote_to_bytes(body)
        if not head.lower().rstrip().endswith(";base64"):
            return data
        data = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise UserError(f"{name} is no data URI ({error}); give data:TYPE;base64,… or a path") from error


def shortened(text: str) -> str:
    """Text of bounded length, without control characters, for a message."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else f"{text[:117]}…"


def write_whole(path: Path, text: str) -> None:
    """Replaces a file's text: written beside it, then put in its place in one step. OSError passes through."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
