"""Prefixes: the states of recent prompts. A prompt that begins as one of them computes only the rest.

What may be reused is decided by `msd.targets.state.reusable_prefix`: tokens, positions and media content are compared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from msd.model import Prefilled
from msd.targets.base import Target
from msd.targets.state import Past, State


class Prefixes:
    """Up to `count` states with at most `bytes` of keys and values; the least recently used ones are dropped."""

    def __init__(self, target: Target, count: int, bytes: int) -> None:
        self.target, self.count, self.bytes = target, count, bytes
        self._states: deque[State] = deque()  # the most recently used one last

    def past(self, input_ids: Tensor) -> Past | None:
        """The state with the longest common beginning with a prompt [1, L], or an empty one; None: nothing is kept."""
        if not self.count:
            return None
        common = [_common(state, input_ids) for state in self._states]
        if not any(common):
            return Past()
        best = common.index(max(common))
        self._states.append(self._states[best])
        del self._states[best]
        return Past(self._states[-1])

    @torch.inference_mode()
    def store(self, request: Prefilled) -> None:
        """Keeps a copy of the state of a prompt of one row, which was prefilled with a `past`."""
        state, L = request.state, request.input_ids.shape[1]
        if not self.count or L * state.cache.slot_bytes > self.bytes:
            return
        cache = self.target.new_cache(1, L)
        cache.copy_prefix(state.cache, L)
        layout = replace(state.layout, start=list(state.layout.start), end=[L])
        layout.tokens, layout.modality = layout.tokens[:, :L].clone(), layout.modality[:, :L].clone()
        layout.positions = layout.positions[:, :, :L].clone()
        taps = None if state.tap_history is None else state.tap_history[:, :L].clone()
        kept = State(layout, cache, source=state.source, media=state.media, tap_history=taps)
        state.tap_history, state.media = None, {}  # the request itself does not need them
        self._states = deque(old for old in self._states if not _contains(kept, old))
        self._states.append(kept)
        while len(self._states) > self.count or self.held > self.bytes:
            self._states.popleft()

    @property
    def held(self) -> int:
        """Bytes of keys and values that are kept."""
        return sum(state.cache.slot_bytes * state.cache.capacity for state in self._states)


def _contains(new: State, old: State) -> bool:
    """Whether a state begins with all of an older one: tokens and media."""
    if _common(old, new.layout.tokens) < old.layout.end[0]:
        return False
    pairs = [pair for kind, items in old.media.items() for pair in zip(items, new.media.get(kind, []), strict=False)]
    return all(torch.equal(mine.data, theirs.data) for mine, theirs in pairs)


def _common(state: State, input_ids: Tensor) -> int:
    """The number of equal tokens at the beginning of a state and a prompt [1, L]."""
    old = state.layout.tokens[0]
    n = min(len(old), input_ids.shape[1])
    return int((old[:n] == input_ids[0, :n]).long().cumprod(0).sum())
