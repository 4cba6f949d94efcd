"""Prophesee's event words. Source: https://docs.prophesee.ai (EVT 2.0 Format, EVT 3.0 Format)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.events.stream import Columns

EVT2_TIME_HIGH = 8
EVT2_WRAP = 1 << 28


class Evt2:
    """Words in, events out; keeps the upper time between calls."""

    def __init__(self) -> None:
        self.high: int | None = None  # with the wraps of the clock counted in

    def __call__(self, words: NDArray[Any]) -> Columns:
        """uint32 [N] -> (t, x, y, p) of the events among them."""
        kind = words >> 28
        times = unwrapped(words[kind == EVT2_TIME_HIGH] & 0xFFFFFFF, self.high, EVT2_WRAP)
        high = np.concatenate([[0 if self.high is None else self.high], times])
        rank = np.cumsum(kind == EVT2_TIME_HIGH)  # of the last upper time before each word
        event = kind <= 1
        if self.high is None:
            event &= rank > 0
        found = words[event]
        t = (high[rank[event]] << 6) | (found >> 22 & 0x3F)
        if len(times):
            self.high = int(times[-1])
        return t, found >> 11 & 0x7FF, found & 0x7FF, kind[event]


def unwrapped(values: NDArray[Any], last: int | None, wrap: int) -> NDArray[np.int64]:
    """A counter's values with its wraps counted in: a fall by over half of `wrap` is a wrap. `last`: the one before."""
    values = values.astype(np.int64)
    if not len(values):
        return values
    before = int(values[0]) if last is None else last % wrap
    wraps = (0 if last is None else last // wrap) + np.cumsum(np.diff(values, prepend=before) < -(wrap // 2))
    return np.asarray(values + wraps * wrap, np.int64)


ADDR_Y, ADDR_X, BASE_X, VECT_12, VECT_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
EVT3_WRAP = 1 << 12
EVT3_STEP = np.zeros(16, np.int64)  # by which a word moves the base
EVT3_STEP[[VECT_12, VECT_8]] = 12, 8


class Evt3:
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
        highs = unwrapped(value[is_high], self.high, EVT3_WRAP)
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
