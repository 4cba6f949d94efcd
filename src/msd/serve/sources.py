"""Sources: where the media of requests may come from. Data URIs always; hosts and a folder if the operator allows them.

Counts are checked by `schema` before; here are the limits of size and time, which hold before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from msd.errors import UserError
from msd.inputs.images import MAX_BYTES
from msd.serve.remote import Remote

TOTAL = 2 * MAX_BYTES  # bytes of all media of a request
SECONDS = 20.0  # in which all of them must have been fetched
FETCHED = re.compile(r"https?:", re.IGNORECASE)
LOCAL = re.compile(r"file://(/[!-\[\]-~]+)", re.IGNORECASE)  # printable ASCII without a backslash


class Sources:
    """hosts: from which files are fetched (see `Remote`). folder: whose files can be opened. By default nothing is."""

    def __init__(self, hosts: Iterable[str] = (), folder: Path | None = None) -> None:
        hosts = tuple(hosts)
        self.remote = Remote(hosts) if hosts else None
        self.folder = None if folder is None else os.path.realpath(folder)
        if self.folder is not None and not os.path.isdir(self.folder):  # noqa: PTH112
            raise UserError(f"there is no folder '{folder}'; give one that exists")

    def fetches(self, parts: Iterable[tuple[str, str]]) -> bool:
        """Whether any of the parts (kind, address) is fetched."""
        return self.remote is not None and any(FETCHED.match(address) for _, address in parts)

    def files(self, parts: Sequence[tuple[str, str]]) -> list[bytes]:
        """The files of a request. parts: (kind, address). UserError for the first that is refused, without its address.

        The message calls it "image 1" or "video 2", for example.
        """
        until, files = time.monotonic() + SECONDS, list[bytes]()
        for number, (kind, address) in enumerate(parts, 1):
            most = min(MAX_BYTES, TOTAL - sum(map(len, files)))
            files.append(self._file(address, f"{kind} {number}", most, until))
            if sum(map(len, files)) > TOTAL:
                raise UserError(f"the media are larger than {TOTAL // 10**6} MB together; compress or resize them")
        return files

    def _file(self, address: str, name: str, most: int, until: float) -> bytes:
        """One file of at most `most` bytes; a data URI may have `MAX_BYTES`, as it is here already."""
        if self.remote is not None and FETCHED.match(address):
            return self.remote.fetch(address, name, most, until)
        if self.folder is not None and address[:5].lower() == "file:":
            return _opened(address, self.folder, name, most)
        return data_of(address, name)


def data_of(uri: str, name: str) -> bytes:
    """The file in a base64 data URI. UserError for any other address; the message has the `name`, not the address."""
    head, comma, body = uri.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise UserError(f"{name} is not a data URI, and this server does not fetch it; send data:…;base64,…")
    if not head.lower().endswith(";base64"):
        raise UserError(f"{name} is a data URI without base64; send data:…;base64,…")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise UserError(f"{name} is larger than {MAX_BYTES // 10**6} MB; compress or resize it")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is not valid base64; encode the file again") from error


def _opened(address: str, folder: str, name: str, most: int) -> bytes:
    """The file of a `file:` URL in the folder. UserError: it is elsewhere, is no regular file, or is too large.

    The message is the same for all but the last, so it does not tell which files there are.
    """
    refused = UserError(f"{name} is no file of this server's media folder; send data:…;base64,…")
    found = LOCAL.fullmatch(address)
    path = unquote(found[1]) if found is not None else "\0"
    if "\0" in path:
        raise refused
    real = os.path.realpath(path)
    if os.path.commonpath([real, folder]) != folder:
        raise refused
    try:
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise refused
            data = file.read(most + 1)
    except OSError as error:
        raise refused from error
    if len(data) > most:
        raise UserError(f"{name} is larger than this server opens; compress or resize it")
    return data
