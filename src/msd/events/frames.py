"""Event frames as EventGPT sees them: a white canvas, red where a pixel last became brighter, blue where darker.

Source: EventGPT (Liu et al., 2024), which cuts a recording into 5 frames of equally many events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.events.cells import Cells, Rates
from msd.events.pieces import By, Events, check_room, cut, edges, extent

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
