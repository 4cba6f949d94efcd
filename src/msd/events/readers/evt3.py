"""EVT 3.0: words of 16 bits, the upper 4 their type. Source: https://docs.prophesee.ai (EVT 3.0 Format).

A word tells what changed since the last: 8 the upper 12 bits of the time (the lower 12 become 0), 6 the lower 12 bits;
0 the y of the events that follow; 2 an event at x (11 bits) with polarity (bit 11); 3 the same fields as a base for
vectors; 4 and 5 a vector: bit i set is an event at base + i, of 12 and of 8 pixels, by which the base then moves on.
Other types (triggers, monitoring) are passed over. Events before the first upper time have no time and are dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.events.readers.evt2 import unwrapped
from msd.events.stream import Columns

ADDR_Y, ADDR_X, BASE_X, VECT_12, VECT_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
WRAP = 1 << 12
STEP = np.zeros(16, np.int64)  # by which a word moves the base
STEP[[VECT_12, VECT_8]] = 12, 8


class Decoder:
    """Words in, events out; keeps time, y, base and polarity between calls."""

    def __init__(self) -> None:
        self.high: int | None = None  # upper time, with the wraps of the clock counted in
        self.time = 0
        self.y = 0
        self.base = 0  # bit 11 upwards: polarity; else x

    def __call__(self, words: NDArray[Any]) -> Columns:
        """uint16 [N] -> (t, x, y, p) of the events among them."""
        kind, value = words >> 12, (words & 0xFFF).astype(np.int64)
        known = self.high is not None
        t = self._times(kind, value)
        rank = np.cumsum((kind == TIME_HIGH) | (kind == TIME_LOW))
        event = (kind == ADDR_X) | (kind == VECT_12) | (kind == VECT_8)
        if not known:
            event &= np.cumsum(kind == TIME_HIGH) > 0
        rows = np.concatenate([[self.y], value[kind == ADDR_Y] & 0x7FF])
        y = rows[np.cumsum(kind == ADDR_Y)]
        self.y = int(rows[-1])
        x, p = self._bases(kind, value)

        single = kind[event] == ADDR_X
        bits = np.where(single, 1, np.where(kind[event] == VECT_8, value[event] & 0xFF, value[event]))
        x = np.where(single, value[event] & 0x7FF, x[event])
        p = np.where(single, value[event] >> 11, p[event])
        word, bit = np.nonzero(bits[:, None] >> np.arange(12) & 1)  # in order of words, and of bits in a word
        return t[rank[event]][word], x[word] + bit, y[event][word], p[word]

    def _times(self, kind: NDArray[Any], value: NDArray[np.int64]) -> NDArray[np.int64]:
        """The time at the start and after each time word, µs."""
        is_high = kind == TIME_HIGH
        marks = is_high | (kind == TIME_LOW)
        highs = unwrapped(value[is_high], self.high, WRAP)
        high = np.concatenate([[self.high or 0], highs])[np.cumsum(is_high[marks])]
        after = (high << 12) | np.where(is_high[marks], 0, value[marks])
        t = np.concatenate([[self.time], after])
        if len(highs):
            self.high = int(highs[-1])
        self.time = int(t[-1])
        return t

    def _bases(self, kind: NDArray[Any], value: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(base x, polarity) of each word: the last base plus the vectors since, itself not counted."""
        is_base = kind == BASE_X
        moved = np.cumsum(STEP[kind])
        before = moved - STEP[kind]
        set_to = np.concatenate([[self.base], value[is_base]])
        at = np.concatenate([[0], moved[is_base]])
        rank = np.cumsum(is_base)
        x = (set_to & 0x7FF)[rank] + before - at[rank]
        p = set_to[rank] >> 11
        if len(kind):
            end = int((set_to[-1] & 0x7FF) + moved[-1] - at[-1])
            self.base = (int(set_to[-1]) & 0x800) | (end & 0x7FF)
        return x, p
