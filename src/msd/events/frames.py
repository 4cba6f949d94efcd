"""Event frames as in EventGPT: a white canvas, red where a pixel last became brighter, blue where it became darker.

Source: EventGPT (Liu et al., 2024), which divides a recording into 5 frames of equally many events.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.events.cells import Cells, cells
from msd.events.recording import By, Events, check_memory, edges, extent, frame_chunks
from msd.system.files import make_folder, write_whole

EMPTY = 2
COLOURS = np.array([[0, 0, 255], [255, 0, 0], [255, 255, 255]], np.uint8)  # by pixel value: darker, brighter, empty
GIF_DELAY = 200  # ms per frame


@dataclass(frozen=True, eq=False)
class EventFrames:
    """Frames of a recording.

    Attributes:
        pixels: uint8 [F, H, W]; the last event of a pixel decides: 0 darker, 1 brighter; 2 without events.
        counts: int64 [F], events of each frame.
        spans: int64 [F, 2], times of its first and last event, µs; zeros for a frame without events.
        cells: the kinds of the input cells, if a grid was given.
    """

    pixels: NDArray[np.uint8]
    counts: NDArray[np.int64]
    spans: NDArray[np.int64]
    cells: Cells | None = None

    def images(self, size: tuple[int, int] | None = None) -> list[Image.Image]:
        """Returns RGB images of the sensor's size, or stretched to `size` (width, height)."""
        images = [Image.fromarray(COLOURS[pixels]) for pixels in self.pixels]
        return images if size is None else [image.resize(size, Image.Resampling.BILINEAR) for image in images]


def event_frames(
    events: Events,
    count: int = 5,
    by: By = "count",
    grid: tuple[int, int] | None = None,
    threshold: float | None = None,
) -> EventFrames:
    """Draws `count` frames of a stream or recording, chunk by chunk.

    Args:
        events: an `EventStream`, or a `Recording`, which is read twice; four times with a grid.
        count: number of frames.
        by: "count" for equally many events per frame, "time" for equally long frames.
        grid: (columns, rows) of the input cells to label sparse or dense; none by default.
        threshold: the least rate of a dense cell in events per second and pixel, such as one that is stored with a
            model; by default it is fitted to the recording.

    Raises:
        UserError: the division is impossible, or the recording is broken.
    """
    width, height = events.size
    check_memory(count, (width, height))
    frame_edges = edges(extent(events), count, by)
    pixels = np.full((count, height * width), EMPTY, np.uint8)
    counts = np.zeros(count, np.int64)
    spans = np.zeros((count, 2), np.int64)
    for frame, chunk in frame_chunks(events, frame_edges, by):
        place = chunk.y.astype(np.intp)
        place *= width
        place += chunk.x
        pixels[frame][place] = chunk.p  # numpy keeps the last value of equal places
        spans[frame, 0] = spans[frame, 0] if counts[frame] else chunk.t[0]
        spans[frame, 1] = chunk.t[-1]
        counts[frame] += len(chunk)
    kinds = None if grid is None else cells(events, grid, count, by, threshold)
    return EventFrames(pixels.reshape(count, height, width), counts, spans, kinds)


def frames(events: Events, count: int = 5, by: By = "count", size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Draws `event_frames` as RGB images of the sensor's size, or stretched to `size` (width, height)."""
    return event_frames(events, count, by).images(size)


def write_frames(images: Sequence[Image.Image], captions: Sequence[str], title: str, out: Path) -> list[Path]:
    """Writes an animation if `out` ends in .gif, a page if in .html, else a folder of frame-000.png and so on.

    Returns the paths written. UserError if they cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix == ".gif":
        options = {"save_all": True, "append_images": images[1:], "duration": GIF_DELAY, "loop": 0}  # 0: forever
        write_whole(out, encoded(images[0], "GIF", **options))
        return [out]
    if suffix == ".html":
        head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>\n"
        write_whole(out, head + snippet(images, captions, title))
        return [out]
    make_folder(out)
    paths = [out / f"frame-{number:03d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        write_whole(path, encoded(image, "PNG"))
    return paths


def snippet(images: Sequence[Image.Image], captions: Sequence[str], title: str = "events") -> str:
    """Returns a `<figure>` that embeds the frames in one row, for use in any page."""
    parts = []
    for image, caption in zip(images, captions, strict=True):
        data = base64.b64encode(encoded(image, "PNG", optimize=True)).decode()
        text = html.escape(caption)
        parts.append(
            f'<div style="flex:1;min-width:8em"><img style="width:100%;border:1px solid #ccc" alt="{text}" '
            f'src="data:image/png;base64,{data}"><small>{text}</small></div>'
        )
    return (
        f'<figure class="events"><figcaption>{html.escape(title)}</figcaption>'
        f'<div style="display:flex;gap:.5em;flex-wrap:wrap">{"".join(parts)}</div></figure>\n'
    )


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Returns an image as a file. options: of `PIL.Image.Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
