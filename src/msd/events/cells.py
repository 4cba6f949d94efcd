"""Cells of the input, such as an image encoder's patches, labelled sparse or dense by their rate of events.

The rate of a cell is its number of events divided by seconds and pixels. The rates of a recording span several powers
of ten. Their logarithms mostly form two groups: noise and slow surfaces, and moving edges. Otsu's threshold separates
the two; the method has no parameter and does not depend on the camera. (The median would label half of every recording
dense, even the recording of a noisy wall.) Cells without events are sparse and do not influence the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.recording import By, Events, edges, extent, frame_chunks
from msd.labels import EVENT_DENSE, EVENT_SPARSE


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of F frames.

    Attributes:
        rates: float64 [F, rows, columns], events per second and pixel.
        kinds: int64 [F, rows, columns], ids of the modalities `event_sparse` and `event_dense`.
        threshold: the least rate of a dense cell; infinite if no cell has events.
    """

    rates: NDArray[np.float64]
    kinds: NDArray[np.int64]
    threshold: float


def cells(
    events: Events, grid: tuple[int, int], count: int = 5, by: By = "count", threshold: float | None = None
) -> Cells:
    """Labels the cells of a grid (columns, rows) sparse or dense in each of `count` frames; reads a recording twice.

    Pixel x is in column x · columns // width. A frame shorter than a millisecond counts as one millisecond. The
    arguments are those of `event_frames`. UserError as there, or if a column or row of the grid would have no pixel.
    """
    columns, rows = grid
    width, height = events.size
    if not (1 <= columns <= width and 1 <= rows <= height):
        raise UserError(
            f"a grid of {columns}x{rows} cells on {width}x{height} pixels; give 1 to {width} columns and "
            f"1 to {height} rows"
        )
    frame_edges = edges(extent(events), count, by)
    column = np.arange(width) * columns // width
    row = np.arange(height) * rows // height
    counts = np.zeros((count, rows * columns), np.int64)
    spans = np.zeros((count, 2), np.int64)  # times of the first and the last event
    for frame, chunk in frame_chunks(events, frame_edges, by):
        spans[frame] = spans[frame, 0] if counts[frame].any() else chunk.t[0], chunk.t[-1]
        counts[frame] += np.bincount(row[chunk.y] * columns + column[chunk.x], minlength=rows * columns)
    seconds = np.maximum(np.diff(frame_edges) if by == "time" else np.diff(spans)[:, 0], 1000) / 1e6
    area = np.outer(np.bincount(row), np.bincount(column))
    rates = counts.reshape(count, rows, columns) / area / seconds[:, None, None]
    threshold = otsu(np.log(rates[rates > 0])) if threshold is None else threshold
    kinds = np.where((rates > 0) & (rates >= threshold), EVENT_DENSE.id, EVENT_SPARSE.id).astype(np.int64)
    return Cells(rates, kinds, float(threshold))


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
    """Returns the threshold that best separates natural logarithms of rates [N] into two groups, as a rate.

    A rate of at least the threshold is in the upper group. The best separation has the largest variance between the
    groups, n₁ · n₂ · (m₁ - m₂)², of sizes n and means m. If all values are equal, all are in the upper group; without
    values the threshold is infinite. Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    values = np.sort(logarithms)
    if not len(values):
        return float("inf")
    below = np.cumsum(values)[:-1]
    n = np.arange(1, len(values))
    between = n * (len(values) - n) * (below / n - (values.sum() - below) / (len(values) - n)) ** 2
    between[values[1:] == values[:-1]] = -1.0  # equal values cannot be separated
    best = int(between.argmax()) + 1 if len(between) and between.max() > 0 else 0
    return float(np.exp(values[best]) * (1 - 1e-12))  # below the value despite the rounding of log and exp
