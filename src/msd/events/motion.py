"""Estimates how the whole picture moves, from the events alone: translation and zoom, without any frame.

An edge that moves across a pixel and then its neighbour leaves two event times; their difference per pixel is the
inverse of its speed. So the gradient g of the last event times and the velocity v of the picture satisfy g · v = 1,
whatever the edge's direction (normal flow; Benosman et al. 2014, "Event-Based Visual Flow"). Noise in the times makes
gradients longer, so fast motion comes out too slow, by up to a quarter; its direction is kept.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from msd.events.recording import Events, check_memory, edges, extent, frame_chunks

LEAST = 20  # gradients that an estimate needs
SLOWEST = 5  # pixels that an edge moves in a span, at least; slower ones are not told from noise
ROUNDS, SPREAD = 12, 0.2  # of reweighting, and the residual that halves a gradient's weight (Cauchy)


def motion(events: Events, count: int = 8) -> NDArray[np.float32]:
    """Returns float32 [count, 5] for equally long spans of time; a recording is read twice.

    Of each span: the picture's velocity to the right and downwards, in sensor widths and heights per second; its zoom,
    per second (1: sizes double in 0.7 s); log10 of the events per second and pixel; seconds. The first three are 0
    where too few edges move. UserError for no span, or too many.
    """
    width, height = events.size
    check_memory(2, events.size)
    whole = extent(events)
    times = edges(whole, count, "time")
    seconds = np.maximum(np.diff(times), 1) * 1e-6
    out = np.zeros((count, 5))
    counts = np.zeros(count)
    for span, parts in groupby(frame_chunks(events, times, "time"), itemgetter(0)):
        last = np.full((2, height, width), np.nan)
        for _, chunk in parts:
            last[chunk.p, chunk.y, chunk.x] = (chunk.t - times[span]) * 1e-6  # the last value of equal places is kept
            counts[span] += len(chunk)
        out[span, :3] = _velocity(last, seconds[span])
    out[:, 3] = np.log10((counts + 1) / (seconds * width * height))
    out[:, 4] = seconds
    return out.astype(np.float32)


def _velocity(last: NDArray[np.float64], seconds: float) -> NDArray[np.float64]:
    """Fits (velocity right, velocity down, zoom) to last event times [2, H, W] in s, NaN without an event."""
    _, height, width = last.shape
    if min(height, width) < 3:
        return np.zeros(3)
    right, down = np.gradient(last, axis=2), np.gradient(last, axis=1)
    steep = np.hypot(right, down)  # seconds per pixel; NaN where a neighbour has no event
    usable = (steep > 0) & (steep < seconds / SLOWEST)
    usable[:, [0, -1]] = usable[:, :, [0, -1]] = False
    if usable.sum() < LEAST:
        return np.zeros(3)
    _, y, x = usable.nonzero()
    right, down = right[usable], down[usable]
    away = right * (x - (width - 1) / 2) + down * (y - (height - 1) / 2)
    rows = np.stack([right * width, down * height, away], 1)
    found, weight = np.zeros(3), np.ones(len(rows))
    for _ in range(ROUNDS):
        weighted = rows * weight[:, None]
        found = np.linalg.lstsq(weighted.T @ rows, weighted.sum(0), rcond=None)[0]
        weight = 1 / (1 + ((rows @ found - 1) / SPREAD) ** 2)
    return found
