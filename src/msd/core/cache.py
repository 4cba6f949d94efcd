"""The key/value cache: preallocated, one slot per column, able to keep an arbitrary accepted path.

A tree of N nodes is written behind the committed slots of each row in one target pass; `commit` then moves the rows of
the accepted path together and forgets the rest. `transformers` sees an ordinary `Cache`. This module knows nothing of
tokens or positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """One decoder layer's view of the cache. `keys`, `values`: [B, H, C, D]."""

    def __init__(self, owner: KVCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the layer's part of the storage on the first keys seen."""
        self.keys, self.values = self.owner._allocate(self.index, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, H, N, D] behind the committed slots; returns views of all slots up to the last written one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        base, width = self.owner.base, key_states.shape[-2]
        first, stop, held = min(base), max(base) + width, len(base)
        keys, values = self.keys[:held], self.values[:held]
        if first + width == stop:
            keys[:, :, first:stop] = key_states
            values[:, :, first:stop] = value_states
        else:
            place, slot = self.owner._written(width)
            keys.transpose(1, 2)[place, slot] = key_states.transpose(1, 2)
            values.transpose(1, 2)[place, slot] = value_states.transpose(1, 2)
        return keys[:, :, :stop], values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of key slots a pass of `query_length` sees, offset of the first)."""
        return max(self.owner.base) + query_length, 0

    def get_seq_length(self) -> int:
        """Committed slots of the longest row held."""
        return max(self.owner.base)

    def get_max_length(self) -> int:
        """C."""
        return self.owner.capacity


class KVCache(Cache):
    """Keys and values of `layers` decoder layers for `batch` rows of `capacity` slots; `committed` slots per row.

    rows: whose keys are held, in the order in which passes write them: all rows, until some are let go.
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.capacity, self.batch = capacity, batch
        self.committed = [0] * batch
        self.rows = list(range(batch))
        self._places: tuple[tuple[list[int], int], tuple[Tensor, Tensor]] | None = None  # of the newest pass
        # blocks [layers, 2, B, H, C, D]: one for all layers of the first shape, one for each other layer, or two of
        # [1, 1, B, H, C, D] for a layer whose keys and values differ
        self._storage: list[Tensor] = []
        self._shared_block: list[Tensor] = []  # the first of them, once it is there
        self._layers = layers
        super().__init__(layers=[_Layer(self, i) for i in range(layers)])

    def _allocate(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        B, H, _, D = keys.shape
        if keys.shape != values.shape:
            apart = [x.new_zeros(1, 1, *x.shape[:2], self.capacity, x.shape[3]) for x in (keys, values)]
            self._storage += apart
            return apart[0][0, 0], apart[1][0, 0]
        if not self._shared_block:
            # zeros, not empty: a masked slot still meets 0 * value, and 0 * NaN is NaN
            self._shared_block.append(keys.new_zeros(self._layers, 2, B, H, self.capacity, D))
            self._storage += self._shared_block
        block = self._shared_block[0]
        if block.shape[2:4] == (B, H) and block.shape[5] == D:
            return block[index, 0], block[index, 1]
        own = keys.new_zeros(1, 2, B, H, self.capacity, D)
        self._storage.append(own)
        return own[0, 0], own[0, 1]

    @property
    def base(self) -> list[int]:
        """Committed slots of each row held, in the order of `rows`."""
        return [self.committed[row] for row in self.rows]

    def _written(self, width: int) -> tuple[Tensor, Tensor]:
        """(place [R, 1], slot [R, W]) of what a pass of `width` writes; made once a pass."""
        asked = self.base, width
        if self._places is None or self._places[0] != asked:
            device = self._storage[0].device
            place = torch.arange(len(self.rows), device=device)[:, None]
            slot = torch.tensor(asked[0], device=device)[:, None] + torch.arange(width, device=device)
            self._places = asked, (place, slot)
        return self._places[1]

    def keep(self, rows: list[int]) -> None:
        """Lets all other rows go: passes are over these alone from now on. The last row held fills a place left."""
        wanted = set(rows)
        for place in range(len(self.rows) - 1, -1, -1):
            if self.rows[place] in wanted:
                continue
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place], used = last, self.committed[last]
                for block in self._storage:
                    block[:, :, place, :, :used] = block[:, :, len(self.rows), :, :used]

    def take(self, other: KVCache, count: int) -> None:
        """Begins with the first `count` slots of another cache of the same model and batch; for an empty cache."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert theirs.keys is not None and theirs.values is not None
            mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None and mine.values is not None
            mine.keys[:, :, :count] = theirs.keys[:, :, :count]
            mine.values[:, :, :count] = theirs.values[:, :, :count]
        self.committed = [count] * self.batch

    def advance(self, count: int) -> None:
        """Commits the `count` slots written last, of every row: the prompt, after prefill."""
        self.committed = [c + count for c in self.committed]

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, of the N slots written last, the nodes `paths[row]` in that order, and forgets the others.

        A path lists node indices, increasing; an empty path keeps nothing of that row.
        """
        for place, row in enumerate(self.rows):
            path, base = paths[row], self.committed[row]
            moved = [(k, n) for k, n in enumerate(path) if k != n]
            if moved:
                target, source = (torch.tensor(x) + base for x in zip(*moved, strict=True))
                for block in self._storage:
                    # the right side is a copy, so overlapping rows are safe
                    block[:, :, place, :, target] = block[:, :, place, :, source]
            self.committed[row] = base + len(path)
