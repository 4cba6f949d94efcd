"""EVT 2.0: words of 32 bits, the upper 4 their type. Source: https://docs.prophesee.ai (EVT 2.0 Format).

0 and 1: an event of polarity 0 or 1: lower 6 bits of the time, x 11 bits, y 11 bits. 8: upper 28 bits of the time.
Other types (triggers, monitoring) are passed over. Events before the first upper time have no time and are dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.events.stream import Columns

TIME_HIGH = 8
WRAP = 1 << 28


class Decoder:
    """Words in, events out; keeps the upper time between calls."""

    def __init__(self) -> None:
        self.high: int | None = None  # with the wraps of the clock counted in

    def __call__(self, words: NDArray[Any]) -> Columns:
        """uint32 [N] -> (t, x, y, p) of the events among them."""
        kind = words >> 28
        times = unwrapped(words[kind == TIME_HIGH] & 0xFFFFFFF, self.high, WRAP)
        high = np.concatenate([[0 if self.high is None else self.high], times])
        rank = np.cumsum(kind == TIME_HIGH)  # of the last upper time before each word
        event = kind <= 1
        if self.high is None:
            event &= rank > 0
        found = words[event]
        t = (high[rank[event]] << 6) | (found >> 22 & 0x3F)
        if len(times):
            self.high = int(times[-1])
        return t, found >> 11 & 0x7FF, found & 0x7FF, kind[event]


def unwrapped(values: NDArray[Any], last: int | None, wrap: int) -> NDArray[np.int64]:
    """A counter's values with its wraps, falls by more than half of `wrap`, counted in. `last`: the one before."""
    values = values.astype(np.int64)
    if not len(values):
        return values
    before = int(values[0]) if last is None else last % wrap
    wraps = (0 if last is None else last // wrap) + np.cumsum(np.diff(values, prepend=before) < -(wrap // 2))
    return np.asarray(values + wraps * wrap, np.int64)
