"""Decodes Prophesee's event words. Source: https://docs.prophesee.ai (EVT 2.0 Format, EVT 3.0 Format)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.events.stream import Columns

EVT2_TIME_HIGH = 8
EVT2_WRAP = 1 << 28


class Evt2:
    """Decodes EVT 2.0. Keeps the upper bits of the time between calls."""

    def __init__(self) -> None:
        self.high: int | None = None  # unwrapped

    def __call__(self, words: NDArray[Any]) -> Columns:
        """Decodes words uint32 [N]."""
        kind = words >> 28
        times = unwrap_clock(words[kind == EVT2_TIME_HIGH] & 0xFFFFFFF, self.high, EVT2_WRAP)
        high = np.concatenate([[0 if self.high is None else self.high], times])
        rank = np.cumsum(kind == EVT2_TIME_HIGH)  # number of upper times up to each word
        event = kind <= 1
        if self.high is None:
            event &= rank > 0
        events = words[event]
        t = (high[rank[event]] << 6) | (events >> 22 & 0x3F)
        if len(times):
            self.high = int(times[-1])
        return t, events >> 11 & 0x7FF, events & 0x7FF, kind[event]


def unwrap_clock(values: NDArray[Any], last: int | None, wrap: int) -> NDArray[np.int64]:
    """Unwraps a counter that restarts at `wrap`: a fall by more than half of `wrap` is a restart.

    last: the unwrapped value before the first one, if any.
    """
    values = values.astype(np.int64)
    if not len(values):
        return values
    before = int(values[0]) if last is None else last % wrap
    wraps = (0 if last is None else last // wrap) + np.cumsum(np.diff(values, prepend=before) < -(wrap // 2))
    return np.asarray(values + wraps * wrap, np.int64)


ADDR_Y, ADDR_X, BASE_X, VECT_12, VECT_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
EVT3_WRAP = 1 << 12
EVT3_STEP = np.zeros(16, np.int64)  # by which each type of word advances the base x
EVT3_STEP[[VECT_12, VECT_8]] = 12, 8


class Evt3:
    """Decodes EVT 3.0. Keeps time, y, base x and polarity between calls."""

    def __init__(self) -> None:
        self.high: int | None = None  # upper bits of the time, unwrapped
        self.time = 0
        self.y = 0
        self.base = 0  # bit 11: polarity; bits 0 to 10: x

    def __call__(self, words: NDArray[Any]) -> Columns:
        """Decodes words uint16 [N]."""
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
        word, bit = np.nonzero(bits[:, None] >> np.arange(12) & 1)  # ordered by word, then by bit
        return t[rank[event]][word], x[word] + bit, y[event][word], p[word]

    def _times(self, kind: NDArray[Any], value: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the time at the start and after each time word, µs."""
        is_high = kind == TIME_HIGH
        marks = is_high | (kind == TIME_LOW)
        highs = unwrap_clock(value[is_high], self.high, EVT3_WRAP)
        high = np.concatenate([[self.high or 0], highs])[np.cumsum(is_high[marks])]
        after = (high << 12) | np.where(is_high[marks], 0, value[marks])
        t = np.concatenate([[self.time], after])
        if len(highs):
            self.high = int(highs[-1])
        self.time = int(t[-1])
        return t

    def _bases(self, kind: NDArray[Any], value: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (base x, polarity) of each word: the last base plus the steps of all vector words in between."""
        is_base = kind == BASE_X
        moved = np.cumsum(EVT3_STEP[kind])
        before = moved - EVT3_STEP[kind]
        set_to = np.concatenate([[self.base], value[is_base]])
        at = np.concatenate([[0], moved[is_base]])
        rank = np.cumsum(is_base)
        x = (set_to & 0x7FF)[rank] + before - at[rank]
        p = set_to[rank] >> 11
        if len(kind):
            end = int((set_to[-1] & 0x7FF) + moved[-1] - at[-1])
            self.base = (int(set_to[-1]) & 0x800) | (end & 0x7FF)
        return x, p
