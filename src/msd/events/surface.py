"""Time surfaces: how recently each pixel had an event of each polarity, fading exponentially.

Source: Lagorce et al., "HOTS: A Hierarchy of Event-Based Time-Surfaces for Pattern Recognition", 2017.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.pieces import Events, chunks

NEVER = np.iinfo(np.int64).min


def time_surface(events: Events, tau: float = 50_000.0, at: int | None = None) -> NDArray[np.float32]:
    """float32 [2, H, W]: exp(-(at - last event's time) / tau) for polarity 0 and 1; 0 where there was no event.

    Args:
        events: a stream, or a recording, which is read once.
        tau: time after which a pixel has faded to 1/e, µs.
        at: the moment to look at, µs; that of the last event by default. Later events are not seen.

    Raises:
        UserError: tau is not above 0.
    """
    if not tau > 0:
        raise UserError(f"tau = {tau} µs; it must be above 0")
    width, height = events.size
    last = np.full(2 * height * width, NEVER, np.int64)
    end = 0
    for chunk in chunks(events):
        seen = chunk if at is None else chunk.part(0, int(np.searchsorted(chunk.t, at, "right")))
        place = (seen.p.astype(np.intp) * height + seen.y) * width + seen.x
        last[place] = seen.t  # of equal places, the last is kept
        end = int(seen.t[-1]) if len(seen) else end
    age = (end if at is None else at) - np.where(last == NEVER, 0, last)
    surface = np.where(last == NEVER, 0.0, np.exp(-age / tau))
    return surface.reshape(2, height, width).astype(np.float32)
