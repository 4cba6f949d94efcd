"""Input cells, such as the patches of an image encoder, and which of them events fill sparsely or densely.

The rate of a cell is its events per second and pixel. Rates of a recording span decades, and mostly have two humps in
their logarithm: noise and slow surfaces, and moving edges. Otsu's cut lies in the valley between the two, wherever that
is: it has no parameter and does not depend on the camera's unit, while a median would call half of every recording
dense, a noisy wall like a street. Cells without events have no logarithm; they are sparse and have no say in the cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.recording import By, Events, cut, edges, extent
from msd.events.stream import EventStream
from msd.labels import EVENT_DENSE, EVENT_SPARSE


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of some frames.

    Attributes:
        rates: float64 [F, rows, columns], events per second and pixel.
        kinds: int64 [F, rows, columns], ids of the modalities `event_sparse` and `event_dense`.
        cut: the least rate of a dense cell; infinite where no cell has events.
    """

    rates: NDArray[np.float64]
    kinds: NDArray[np.int64]
    cut: float


class Rates:
    """Counts events by cell, piece by piece."""

    def __init__(self, frames: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
        """size: (width, height) of the sensor. grid: (columns, rows); pixel x is in column x · columns // width."""
        columns, rows = grid
        width, height = size
        if not (1 <= columns <= width and 1 <= rows <= height):
            raise UserError(f"a grid of {columns}x{rows} cells on {width}x{height} pixels; give from 1 cell to a pixel")
        self.shape = (rows, columns)
        self.column = np.arange(width) * columns // width
        self.row = np.arange(height) * rows // height * columns
        self.counts = np.zeros((frames, rows * columns), np.int64)
        self.area = np.outer(np.bincount(self.row // columns), np.bincount(self.column))

    def add(self, frame: int, piece: EventStream) -> None:
        """Counts some events of a frame."""
        cell = self.row[piece.y] + self.column[piece.x]
        self.counts[frame] += np.bincount(cell, minlength=self.counts.shape[1])

    def cells(self, durations: NDArray[np.int64], cut_at: float | None = None) -> Cells:
        """Rates and kinds, from the length of each frame in µs; frames of less than a millisecond count as one long."""
        seconds = np.maximum(durations, 1000) / 1e6
        rates = self.counts.reshape(-1, *self.shape) / self.area / seconds[:, None, None]
        cut_at = otsu(np.log(rates[rates > 0])) if cut_at is None else cut_at
        dense = (rates > 0) & (rates >= cut_at)
        kinds = np.where(dense, EVENT_DENSE.id, EVENT_SPARSE.id).astype(np.int64)
        return Cells(rates, kinds, float(cut_at))


def cells(
    events: Events, grid: tuple[int, int], count: int = 5, by: By = "count", cut_at: float | None = None
) -> Cells:
    """Which cells of a grid (columns, rows) are sparse or dense in each of `count` frames.

    Args: as those of `event_frames`, which gives the same cells along with the frames.
    """
    whole = extent(events)
    borders = edges(whole, count, by)
    rates = Rates(count, events.size, grid)
    spans: dict[int, tuple[int, int]] = {}
    for frame, piece in cut(events, borders, by):
        rates.add(frame, piece)
        spans[frame] = (spans.get(frame, piece.span)[0], piece.span[1])
    found = np.array([np.subtract(*spans.get(frame, (0, 0))[::-1]) for frame in range(count)])
    return rates.cells(np.diff(borders) if by == "time" else found, cut_at)


def cell_kinds(recording: Events, frames: int, tokens: int) -> NDArray[np.int64]:
    """Returns the modality id of each image token's cell, [frames, tokens], row by row; -1 for a class token.

    The frames divide the recording into equal time spans; a frame's cells count the events of its span.

    tokens: image tokens per frame: a square grid, or one more, whose first is a class token without a cell. UserError
    for other numbers.
    """
    side = math.isqrt(tokens)
    first = tokens - side * side
    if first > 1:
        raise UserError(f"{tokens} image tokens per frame are no square grid, so they match no cells of events")
    kinds = cells(recording, (side, side), frames, "time").kinds.reshape(frames, -1)
    return np.pad(kinds, ((0, 0), (first, 0)), constant_values=-1)


def otsu(logarithms: NDArray[np.float64]) -> float:
    """The rate (not its logarithm) that parts log rates [N] into the two groups that lie farthest apart.

    That is the largest variance between the groups, n₁ · n₂ · (m₁ - m₂)², over all cuts between values; the cut is the
    least value of the upper group. All are one group, and dense, where all are equal; infinite without values.
    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    values = np.sort(logarithms)
    if not len(values):
        return float("inf")
    below = np.cumsum(values)[:-1]
    n = np.arange(1, len(values))
    between = n * (len(values) - n) * (below / n - (values.sum() - below) / (len(values) - n)) ** 2
    between[values[1:] == values[:-1]] = -1.0  # a cut between equal values is none
    best = int(between.argmax()) + 1 if len(between) and between.max() > 0 else 0
    return float(np.exp(values[best]) * (1 - 1e-12))  # of rates rounded the same way, the least stays dense
