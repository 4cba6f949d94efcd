"""AEDAT 4 (iniVation DV), through the `aedat` package (MIT, Rust). The first stream of events in the file is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import File, library
from msd.events.recording import Source
from msd.events.stream import Columns

BROKEN = "the file is truncated or damaged: copy it again"


def read(file: File) -> Source:
    """The first stream of events."""
    file.one_recording()
    decoder = _open(file)
    streams = [(number, about) for number, about in decoder.id_to_stream().items() if about["type"] == "events"]
    if not streams:
        raise UserError("it has no stream of events; record or export one with events")
    number, about = min(streams, key=lambda stream: stream[0])
    return Source("aedat4", lambda chunk: _columns(file, number, chunk), (about["width"], about["height"]), "header")


def _open(file: File) -> Any:
    aedat = library("aedat", "AEDAT 4")
    try:
        return aedat.Decoder(str(file.path))
    except BaseException as error:  # the package raises RuntimeError and others, and panics, which are no Exception
        _let_through(error)
        raise UserError(f"its header cannot be read ({error}); {BROKEN}") from error


def _let_through(error: BaseException) -> None:
    """Raises what is no complaint of the package, such as Ctrl-C."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _columns(file: File, number: int, chunk: int) -> Iterator[Columns]:
    """Packets of some thousand events, gathered to chunks."""
    packets = iter(_open(file))
    held: list[Any] = []
    while True:
        try:
            packet = next(packets, None)
        except BaseException as error:  # as in `_open`
            _let_through(error)
            raise UserError(f"a packet cannot be read ({error}); {BROKEN}") from error
        if packet is not None and packet["stream_id"] == number:
            held.append(packet["events"])
        if held and (packet is None or sum(map(len, held)) >= chunk):
            events = np.concatenate(held)
            held = []
            yield events["t"], events["x"], events["y"], events["p"]
        if packet is None:
            return
