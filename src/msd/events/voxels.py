"""Voxel grids: polarities summed by pixel and time bin, an event shared between the two nearest bins.

Source: Zhu et al., "Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion", 2019, equations 1 and 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.pieces import Events, chunks, extent


def voxel_grid(events: Events, bins: int = 5) -> NDArray[np.float32]:
    """float32 [bins, H, W]: the sum over events of ±1 · max(0, 1 - |b - t*|), t* from 0 to bins - 1 over the span.

    Polarity 1 counts as +1 and 0 as -1. Where all events have one time, they are in the first bin. A recording is read
    twice, chunk by chunk. UserError for fewer than 1 bin.
    """
    if bins < 1:
        raise UserError(f"{bins} time bins; ask for at least 1")
    whole = extent(events)
    width, height = events.size
    grid = np.zeros(bins * height * width, np.float64)
    scale = (bins - 1) / max(whole.end - whole.begin, 1)
    for chunk in chunks(events):
        at = (chunk.t - whole.begin) * scale
        lower = np.minimum(at.astype(np.intp), bins - 1)
        share = at - lower
        sign = chunk.p.astype(np.float64) * 2 - 1
        place = (lower * height + chunk.y) * width + chunk.x
        grid += np.bincount(place, sign * (1 - share), len(grid))
        inner = lower < bins - 1
        grid += np.bincount(place[inner] + height * width, (sign * share)[inner], len(grid))
    return grid.reshape(bins, height, width).astype(np.float32)
