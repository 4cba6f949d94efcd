"""`msd events`: describes an event file, and draws its frames."""

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
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, max=1000, help="Number of frames to draw; by default 5.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", help="'count', the default: equally many events per frame; 'time': frames of equal duration."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Sensor as WIDTHxHEIGHT, for files that do not hold it.")
    ] = None,
    recording: Annotated[
        int, typer.Option("--recording", min=0, help="Index of the recording, in a file with several.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Print the number of events, the time span and the sensor of a file, and draw frames."""
    from msd.events import event_frames, open_chunks
    from msd.events.frames import write_frames
    from msd.events.recording import edges, extent

    if out is not None and out.suffix.lower() not in ("", ".gif", ".html"):
        raise UserError(f"--out '{out}' is not a .gif or .html file; use one of these endings, or name a folder")
    if out is not None:
        check_place(out, folder=out.suffix == "")
    drawing = frames is not None or by is not None
    frames, by = frames or 5, by or "count"
    source = open_chunks(file, size=_size(size), recording=recording)
    span = extent(source)
    edges(span, frames, by)  # type: ignore[arg-type]  # raises UserError for an unknown --by
    if drawing and out is None:
        raise UserError("--frames and --by are of the frames that --out draws; name a file or folder with --out")
    seconds = (span.end - span.begin) / 1e6
    summary: dict[str, Any] = {
        "file": str(file),
        "format": source.format,
        "events": span.events,
        "begin_us": span.begin,
        "end_us": span.end,
        "seconds": seconds,
        "events_per_second": span.events / seconds if seconds else None,
        "width": source.size[0],
        "height": source.size[1],
        "size_from": source.size_from,
        "written": [],
    }
    if out is not None:
        drawn = event_frames(source, frames, by)  # type: ignore[arg-type]
        captions = [f"{n} events, {a} to {b} µs" for n, (a, b) in zip(drawn.counts, drawn.spans, strict=True)]
        summary["written"] = [str(path) for path in write_frames(drawn.images(), captions, file.name, out)]
    print(json.dumps(summary) if as_json else _text(summary))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise UserError(f"--size '{text}' is not WIDTHxHEIGHT, as in 640x480")
    return int(match[1]), int(match[2])


def _text(summary: dict[str, Any]) -> str:
    """Returns the summary as lines of text."""
    rate = summary["events_per_second"]
    command = f"msd generate --events {shlex.quote(summary['file'])} -p 'What happens?'"
    lines = [
        f"{summary['file']}: {summary['format']}, {summary['events']:,} events",
        f"from {summary['begin_us']:,} to {summary['end_us']:,} µs: {summary['seconds']:.6f} s"
        + (f", {rate:,.0f} events/s" if rate else ""),
        f"sensor {summary['width']}x{summary['height']} (from: {summary['size_from']})",
        *(f"wrote {path}" for path in summary["written"]),
        *([f"to ask about it: {command}"] if summary["events"] else []),
    ]
    return "\n".join(lines)
