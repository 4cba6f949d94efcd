"""`msd events`: what is in an event file, and its frames as pictures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from msd.cli.options import Json
from msd.errors import UserError
from msd.system.files import check_place


def events(
    file: Annotated[Path, typer.Argument(help="An event file (formats: docs/events.md).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw frames: a .gif, a .html, or a folder for PNG files.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, max=1000, help="How many frames.")] = 5,
    by: Annotated[
        str, typer.Option("--by", help="'count': equally many events a frame; 'time': equally long.")
    ] = "count",
    size: Annotated[
        str | None, typer.Option("--size", help="Sensor as WIDTHxHEIGHT, for files that do not tell it.")
    ] = None,
    recording: Annotated[int, typer.Option("--recording", min=0, help="Which, of a file with several.")] = 0,
    as_json: Json = False,
) -> None:
    """Tell how many events a file holds, from when to when, from what sensor; and draw them."""
    from msd.events import event_frames, open_chunks
    from msd.events.frames import write_frames
    from msd.events.recording import edges, extent

    if out is not None and out.suffix.lower() not in ("", ".gif", ".html"):
        raise UserError(f"'{out}' is no .gif or .html; give a name that ends so, or a folder for PNG files")
    if out is not None:
        check_place(out, folder=out.suffix == "")
    found = open_chunks(file, size=_size(size), recording=recording)
    whole = extent(found)
    edges(whole, frames, by)  # type: ignore[arg-type]  # refuses what it does not know
    seconds = (whole.end - whole.begin) / 1e6
    summary: dict[str, Any] = {
        "file": str(file),
        "format": found.format,
        "events": whole.events,
        "begin_us": whole.begin,
        "end_us": whole.end,
        "seconds": seconds,
        "events_per_second": whole.events / seconds if seconds else None,
        "width": found.size[0],
        "height": found.size[1],
        "size_from": found.size_from,
        "written": [],
    }
    if out is not None:
        made = event_frames(found, frames, by)  # type: ignore[arg-type]
        captions = [f"{n} events, {a} to {b} µs" for n, (a, b) in zip(made.counts, made.spans, strict=True)]
        summary["written"] = [str(path) for path in write_frames(made.images(), captions, file.name, out)]
    print(json.dumps(summary) if as_json else _told(summary))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise UserError(f"--size '{text}' is not WIDTHxHEIGHT, as in 640x480")
    return int(found[1]), int(found[2])


def _told(summary: dict[str, Any]) -> str:
    """The summary in words."""
    rate = summary["events_per_second"]
    ask = f"msd generate --events {shlex.quote(summary['file'])} -p 'What happens?'"
    lines = [
        f"{summary['file']}: {summary['format']}, {summary['events']:,} events",
        f"from {summary['begin_us']:,} to {summary['end_us']:,} µs: {summary['seconds']:.6f} s"
        + (f", {rate:,.0f} events/s" if rate else ""),
        f"sensor {summary['width']}x{summary['height']} (from: {summary['size_from']})",
        *(f"wrote {path}" for path in summary["written"]),
        *([f"to ask about it: {ask}"] if summary["events"] else []),
    ]
    return "\n".join(lines)
