"""Voxel grids and time surfaces: event representations that networks take as input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.recording import Events, check_memory, chunks, extent

NEVER = np.iinfo(np.int64).min


def time_surface(events: Events, tau: float = 50_000.0, at: int | None = None) -> NDArray[np.float32]:
    """Returns float32 [2, H, W]: exp(-(at - time of the pixel's last event) / tau) for polarity 0 and 1.

    Pixels without events are 0.

    Args:
        events: a stream, or a recording, which is read once.
        tau: time after which a pixel has decayed to 1/e, µs.
        at: time of the surface, µs; later events do not count. Default: the time of the last event.

    Raises:
        UserError: tau is not above 0.
    """
    if not tau > 0:
        raise UserError(f"tau = {tau} µs; it must be above 0")
    check_memory(2, events.size)
    width, height = events.size
    last = np.full(2 * height * width, NEVER, np.int64)
    end = 0
    for chunk in chunks(events):
        seen = chunk if at is None else chunk.part(0, int(np.searchsorted(chunk.t, at, "right")))
        place = (seen.p.astype(np.intp) * height + seen.y) * width + seen.x
        last[place] = seen.t  # numpy keeps the last value of equal places
        end = int(seen.t[-1]) if len(seen) else end
    age = (end if at is None else at) - np.where(last == NEVER, 0, last)
    surface = np.where(last == NEVER, 0.0, np.exp(-age / tau))
    return surface.reshape(2, height, width).astype(np.float32)


def voxel_grid(events: Events, bins: int = 5) -> NDArray[np.float32]:
    """Returns float32 [bins, H, W]: per bin b the sum over events of ±1 · max(0, 1 - |b - t*|).

    t* is the event's time, scaled to 0 … bins - 1 over the whole span. Polarity 1 counts +1, polarity 0 counts -1. If
    all events have one time, they are in the first bin. A recording is read twice. UserError for fewer than 1 bin or
    too many.
    """
    if bins < 1:
        raise UserError(f"{bins} time bins; ask for at least 1")
    check_memory(bins, events.size)
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
