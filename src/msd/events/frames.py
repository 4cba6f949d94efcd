"""Event frames as EventGPT sees them: a white canvas, red where a pixel last became brighter, blue where darker.

Source: EventGPT (Liu et al., 2024), which cuts a recording into 5 frames of equally many events.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.events.cells import Cells, Rates
from msd.events.recording import By, Events, check_room, cut, edges, extent
from msd.system.files import make_folder, write_whole

EMPTY = 2
COLOURS = np.array([[0, 0, 255], [255, 0, 0], [255, 255, 255]], np.uint8)  # by pixel value: darker, brighter, empty


@dataclass(frozen=True, eq=False)
class EventFrames:
    """Frames of a recording.

    Attributes:
        pixels: uint8 [F, H, W]; 0 darker, 1 brighter (the last event of a pixel counts), 2 no event.
        counts: int64 [F], events of each frame.
        spans: int64 [F, 2], times of its first and last event, µs; zeros for a frame without events.
        cells: the kinds of the input cells, if a grid was asked for.
    """

    pixels: NDArray[np.uint8]
    counts: NDArray[np.int64]
    spans: NDArray[np.int64]
    cells: Cells | None = None

    def images(self, size: tuple[int, int] | None = None) -> list[Image.Image]:
        """RGB images, of the sensor's size or stretched to (width, height)."""
        images = [Image.fromarray(COLOURS[pixels]) for pixels in self.pixels]
        return images if size is None else [image.resize(size, Image.Resampling.BILINEAR) for image in images]


def event_frames(
    events: Events, count: int = 5, by: By = "count", grid: tuple[int, int] | None = None, cut_at: float | None = None
) -> EventFrames:
    """`count` frames of a stream or recording, made piece by piece.

    Args:
        events: an `EventStream`, or a `Recording`, which is read twice.
        by: "count" for equally many events a frame, "time" for equally long frames.
        grid: (columns, rows) of input cells to mark sparse or dense; none by default.
        cut_at: their cut in events per second and pixel, as stored with a model; by default it adapts to the recording.

    Raises:
        UserError: no such division, or the recording is broken.
    """
    width, height = events.size
    check_room(count, (width, height))
    borders = edges(extent(events), count, by)
    pixels = np.full((count, height * width), EMPTY, np.uint8)
    counts = np.zeros(count, np.int64)
    spans = np.zeros((count, 2), np.int64)
    rates = None if grid is None else Rates(count, (width, height), grid)
    for frame, piece in cut(events, borders, by):
        place = piece.y.astype(np.intp)
        place *= width
        place += piece.x
        pixels[frame][place] = piece.p  # of equal places, the last is kept
        if rates is not None:
            rates.add(frame, piece)
        spans[frame, 0] = spans[frame, 0] if counts[frame] else piece.t[0]
        spans[frame, 1] = piece.t[-1]
        counts[frame] += len(piece)
    if rates is None:
        cells = None
    else:
        cells = rates.cells(np.diff(borders) if by == "time" else spans[:, 1] - spans[:, 0], cut_at)
    return EventFrames(pixels.reshape(count, height, width), counts, spans, cells)


def frames(events: Events, count: int = 5, by: By = "count", size: tuple[int, int] | None = None) -> list[Image.Image]:
    """`event_frames` as RGB images, of the sensor's size or stretched to (width, height)."""
    return event_frames(events, count, by).images(size)


DELAY = 200  # ms a frame of the GIF


def write_frames(images: Sequence[Image.Image], out: Path) -> list[Path]:
    """Writes frames to `out`: one animation if it ends in .gif, else a folder of frame-000.png and so on.

    Returns what was written. UserError where it cannot be.
    """
    if out.suffix.lower() == ".gif":
        write_whole(out, gif(images))
        return [out]
    make_folder(out)
    paths = [out / f"frame-{number:03d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        write_whole(path, _png(image))
    return paths


def write_html(images: Sequence[Image.Image], captions: Sequence[str], title: str, out: Path) -> list[Path]:
    """Writes a `snippet` as a page of its own. Returns what was written; UserError where it cannot be."""
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>\n"
    write_whole(out, head + snippet(images, captions, title))
    return [out]


def gif(images: Sequence[Image.Image]) -> bytes:
    """The frames one after another, for ever."""
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=list(images[1:]), duration=DELAY, loop=0)
    return buffer.getvalue()


def _png(image: Image.Image, optimize: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def snippet(images: Sequence[Image.Image], captions: Sequence[str], title: str = "events") -> str:
    """A `<figure>` with the frames side by side, images inside it, to be set in any page."""
    parts = []
    for image, caption in zip(images, captions, strict=True):
        data = base64.b64encode(_png(image, optimize=True)).decode()
        text = html.escape(caption)
        parts.append(
            f'<div style="flex:1;min-width:8em"><img style="width:100%;border:1px solid #ccc" alt="{text}" '
            f'src="data:image/png;base64,{data}"><small>{text}</small></div>'
        )
    return (
        f'<figure class="events"><figcaption>{html.escape(title)}</figcaption>'
        f'<div style="display:flex;gap:.5em;flex-wrap:wrap">{"".join(parts)}</div></figure>\n'
    )
