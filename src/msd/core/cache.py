"""A preallocated key/value cache that can keep any accepted path of a draft tree.

One target pass writes the N nodes of a tree behind the committed slots of each row. `commit` then moves the slots of
the accepted path together and discards the others. For `transformers` this is an ordinary `Cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from msd.errors import UserError


class _Layer(CacheLayerMixin):
    """The view that one decoder layer has of the cache. `keys`, `values`: [B, H, C, D]."""

    def __init__(self, owner: KVCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the layer's storage once the shape of its keys is known."""
        self.owner._allocate(self.index, key_states, value_states)
        self.bind()

    def bind(self) -> None:
        """Takes the views of the owner's storage that belong to this layer."""
        self.keys, self.values = self.owner._views(self.index)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, H, N, D] behind the committed slots; returns views of all slots up to the last written one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        base, width = self.owner.base, key_states.shape[-2]
        first, stop, rows = min(base), max(base) + width, len(base)
        self.owner.written = max(self.owner.written, stop)
        keys, values = self.keys[:rows], self.values[:rows]
        if first + width == stop:
            keys[:, :, first:stop] = key_states
            values[:, :, first:stop] = value_states
        else:
            index = self.owner._write_index(width)
            keys.transpose(1, 2)[index] = key_states.transpose(1, 2)
            values.transpose(1, 2)[index] = value_states.transpose(1, 2)
        return keys[:, :, :stop], values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of key slots that a pass of `query_length` tokens attends to, offset of the first one)."""
        return max(self.owner.base) + query_length, 0

    def get_seq_length(self) -> int:
        """Committed slots of the longest stored row."""
        return max(self.owner.base)

    def get_max_length(self) -> int:
        """C."""
        return self.owner.capacity


class KVCache(Cache):
    """Keys and values of `layers` decoder layers for `batch` rows of `capacity` slots.

    committed: for each row, the number of slots that hold committed tokens.
    rows: the rows that are stored, in the order in which passes write them; all rows until `keep` drops some.
    written: one past the last slot that any pass has written. Slots behind a row's committed ones may hold old values.
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.capacity, self.batch = capacity, batch
        self.committed = [0] * batch
        self.rows = list(range(batch))
        self.written = 0
        self._index: tuple[tuple[list[int], int], tuple[Tensor, Tensor]] | None = None  # of the newest pass
        # Blocks of [layers, 2, B, H, C, D]. Layers with the shape of the first layer share one block, every other layer
        # has its own, or two of [1, 1, B, H, C, D] where its keys and values differ in shape.
        self._storage: list[Tensor] = []
        self._shared_block: int | None = None
        # (block, i, j) of the keys and of the values of each layer: `_storage[block][i, j]`
        self._places: dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = {}
        self._layers = layers
        super().__init__(layers=[_Layer(self, i) for i in range(layers)])

    @property
    def node_bytes(self) -> int:
        """Bytes that a scored node of one row takes until `commit`, besides its slot."""
        return 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot of one row; 0 before the first pass."""
        return sum(x[:, :, 0, :, 0].numel() * x.element_size() for x in self._storage)

    def _allocate(self, index: int, keys: Tensor, values: Tensor) -> None:
        B, H, _, D = keys.shape
        if keys.shape != values.shape:
            block = len(self._storage)
            self._storage += [x.new_zeros(1, 1, *x.shape[:2], self.capacity, x.shape[3]) for x in (keys, values)]
            self._places[index] = (block, 0, 0), (block + 1, 0, 0)
            return
        if self._shared_block is None:
            # zeros, not empty: attention multiplies masked slots by 0, and 0 * NaN is NaN
            self._shared_block = len(self._storage)
            self._storage.append(keys.new_zeros(self._layers, 2, B, H, self.capacity, D))
        block, at, shared = self._shared_block, index, self._storage[self._shared_block]
        if shared.shape[2:4] != (B, H) or shared.shape[5] != D:
            block, at = len(self._storage), 0
            self._storage.append(keys.new_zeros(1, 2, B, H, self.capacity, D))
        self._places[index] = (block, at, 0), (block, at, 1)

    def _views(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values [B, H, C, D] of a layer."""
        keys, values = (self._storage[block][i, j] for block, i, j in self._places[index])
        return keys, values

    @property
    def base(self) -> list[int]:
        """Committed slots of each stored row, in the order of `rows`."""
        return [self.committed[row] for row in self.rows]

    def _write_index(self, width: int) -> tuple[Tensor, Tensor]:
        """(row index [R, 1], slot [R, W]) of what a pass of `width` tokens writes; computed once per pass."""
        key = self.base, width
        if self._index is None or self._index[0] != key:
            device = self._storage[0].device
            row = torch.arange(len(self.rows), device=device)[:, None]
            slot = torch.tensor(key[0], device=device)[:, None] + torch.arange(width, device=device)
            self._index = key, (row, slot)
        return self._index[1]

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows, so that passes run over `rows` only. The last stored row fills each gap."""
        wanted = set(rows)
        for index in range(len(self.rows) - 1, -1, -1):
            if self.rows[index] in wanted:
                continue
            last = self.rows.pop()
            if index < len(self.rows):
                self.rows[index], used = last, self.committed[last]
                for block in self._storage:
                    block[:, :, index, :, :used] = block[:, :, len(self.rows), :, :used]
                    block[:, :, index, :, used : self.written] = 0  # a NaN of the dropped row must not stay

    def select(self, rows: list[int]) -> None:
        """Drops all other rows for good, and numbers `rows` 0, 1, … in this order."""
        self.keep(rows)
        number = {row: i for i, row in enumerate(rows)}
        self.rows = [number[row] for row in self.rows]
        self.committed, self.batch = [self.committed[row] for row in rows], len(rows)

    def join(self, other: KVCache) -> None:
        """Appends the rows of `other`, a cache of the same model; their numbers follow those of this cache."""
        first, added, slots = len(self.rows), len(other.rows), max(other.base)
        self.reserve(first + added, max(self.capacity, other.capacity))
        for mine, theirs in zip(self._storage, other._storage, strict=True):
            mine[:, :, first : first + added, :, :slots] = theirs[:, :, :added, :, :slots]
            mine[:, :, first : first + added, :, slots : self.written] = 0
        self.rows += [self.batch + row for row in other.rows]
        self.committed += other.committed
        self.batch += other.batch
        self.written = max(self.written, slots)

    def add_unstored(self, before: int = 0, behind: int = 0) -> None:
        """Numbers rows that are not stored, as if `keep` had dropped them, before and behind all others."""
        self.rows = [before + row for row in self.rows]
        self.committed = [0] * before + self.committed + [0] * behind
        self.batch += before + behind

    def reserve(self, rows: int, capacity: int) -> None:
        """Moves to larger storage if it has no room for `rows` rows of `capacity` slots; rows grow by doubling."""
        held, capacity = self._storage[0].shape[2], max(capacity, self.capacity)
        if rows <= held and capacity == self.capacity:
            return
        rows, stored = held if rows <= held else max(rows, 2 * held), len(self.rows)
        for n, block in enumerate(self._storage):
            sides, (H, D) = block.shape[:2], block.shape[3::2]
            self._storage[n] = block.new_zeros(*sides, rows, H, capacity, D)
            self._storage[n][:, :, :stored, :, : self.written] = block[:, :, :stored, :, : self.written]
        self.capacity = capacity
        for layer in self._attention():
            if layer.index in self._places:
                layer.bind()

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values [R, H, S, D] of a layer in the first `slots` slots of the stored rows."""
        stored, rows = self.layers[layer], len(self.rows)
        assert stored.keys is not None and stored.values is not None
        return stored.keys[:rows, :, :slots], stored.values[:rows, :, :slots]

    def copy_prefix(self, other: KVCache, count: int) -> None:
        """Copies the first `count` slots of `other`, a cache of the same model and batch, into this empty cache."""
        for mine, theirs in zip(self._attention(), other._attention(), strict=True):
            if theirs.keys is None or theirs.values is None:  # this layer reads the keys of another
                continue
            mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None and mine.values is not None
            mine.keys[:, :, :count] = theirs.keys[:, :, :count]
            mine.values[:, :, :count] = theirs.values[:, :, :count]
        self.committed = [count] * self.batch

    def _attention(self) -> list[_Layer]:
        """The layers that store keys and values."""
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def advance(self, count: int) -> None:
        """Commits the last `count` written slots of every row: the prompt, after prefill."""
        self.committed = [c + count for c in self.committed]

    @contextmanager
    def behind(self, count: int) -> Iterator[None]:
        """Inside, passes write behind the first `count` uncommitted slots of every row, and keep these."""
        committed = self.committed
        self.committed = [c + count for c in committed]
        try:
            yield
        finally:
            self.committed = committed

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps the nodes `paths[row]` of the N slots written last, in that order, and discards the others.

        A path is a list of increasing node indices; an empty path keeps none.
        """
        for index, row in enumerate(self.rows):
            path, base = paths[row], self.committed[row]
            moved = [(k, n) for k, n in enumerate(path) if k != n]
            if moved:
                target, source = (torch.tensor(x) + base for x in zip(*moved, strict=True))
                for block in self._storage:
                    # the right side is a copy, so overlapping rows are safe
                    block[:, :, index, :, target] = block[:, :, index, :, source]
            self.committed[row] = base + len(path)

    def crop(self, tokens_to_remove: int) -> None:
        """UserError: dropping the newest columns applies neither to trees nor to the states of recurrent layers."""
        raise UserError("this cache cannot be cropped; `commit` keeps the accepted path of a tree and drops the rest")
