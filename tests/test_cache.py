"""KVCache: preallocated slots, per-row commits of arbitrary paths, layers of different shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msd.core.cache import KVCache

B, H, D, C = 2, 2, 3, 24


def block(first: int, count: int, heads: int = H) -> Tensor:
    """Keys [B, heads, count, D] with the values 1000 * row + number."""
    number = torch.arange(first, first + count).float()
    rows = 1000.0 * torch.arange(B)
    return (rows[:, None, None, None] + number[None, None, :, None]).expand(B, heads, count, D).clone()


def written(cache: KVCache, layer: int, row: int) -> list[int]:
    """The numbers in the committed slots of a row, without 1000 * row."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    assert keys is not None and values is not None
    committed = cache.committed[row]
    assert torch.equal(keys[row, :, :committed] + 0.5, values[row, :, :committed])
    assert bool((keys[row, :, :committed] == keys[row, :1, :committed, :1]).all()), "heads and channels move together"
    return (keys[row, 0, :committed, 0] - 1000 * row).long().tolist()


def write(cache: KVCache, first: int, count: int, heads: tuple[int, ...] = (H,)) -> None:
    for layer, h in enumerate(heads):
        keys = block(first, count, h)
        cache.update(keys, keys + 0.5, layer)


@st.composite
def paths(draw: st.DrawFn) -> list[list[list[int]]]:
    """Steps of 4 nodes each: for each row, a path of increasing nodes, which may be empty."""
    steps = draw(st.integers(1, 4))
    path = st.lists(st.integers(0, 3), unique=True, max_size=4).map(sorted)
    return [[draw(path) for _ in range(B)] for _ in range(steps)]


@settings(deadline=None, derandomize=True)
@given(paths())
@pytest.mark.parametrize("heads", [(H, H), (H, 1, H)])
def test_commit_keeps_the_paths_in_order_and_discards_the_rest(
    heads: tuple[int, ...], steps: list[list[list[int]]]
) -> None:
    cache = KVCache(len(heads), B, C)
    write(cache, 0, 5, heads)
    cache.advance(5)
    expected = [list(range(5)) for _ in range(B)]
    for step, kept in enumerate(steps):
        first = 100 * (step + 1)
        write(cache, first, 4, heads)
        cache.commit(kept)
        for row, path in enumerate(kept):
            expected[row] += [first + n for n in path]
    for layer in range(len(heads)):
        assert [written(cache, layer, row) for row in range(B)] == expected
    assert cache.committed == [len(e) for e in expected]


def test_update_returns_all_slots_up_to_the_last_written_one() -> None:
    cache = KVCache(1, B, C)
    write(cache, 0, 5)
    cache.advance(5)
    write(cache, 10, 3)
    cache.commit([[0, 2], []])
    assert cache.committed == [7, 5]
    keys, values = cache.update(block(20, 3), block(20, 3) + 0.5, 0)
    assert keys.shape == values.shape == (B, H, 10, D)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 10, 12, 20, 21, 22]
    assert keys[1, 0, :8, 0].tolist() == [1000, 1001, 1002, 1003, 1004, 1020, 1021, 1022]
    assert cache.get_mask_sizes(3, 0) == (10, 0)
    assert cache.get_seq_length() == 7


def test_capacity_is_allocated_once_and_cannot_be_exceeded() -> None:
    cache = KVCache(1, B, 6)
    write(cache, 0, 5)
    keys = cache.layers[0].keys
    assert keys is not None and keys.shape == (B, H, 6, D)
    cache.advance(5)
    write(cache, 5, 1)
    again = cache.layers[0].keys
    assert again is not None and again.data_ptr() == keys.data_ptr()
    with pytest.raises(RuntimeError):
        write(cache, 6, 2)
    assert cache.layers[0].get_max_length() == 6


def test_keys_and_values_of_different_width_move_together() -> None:
    """Latent attention (DeepSeek), in the second of three layers."""
    cache = KVCache(3, B, C)
    for first, count in ((0, 5), (10, 4)):
        for layer in range(3):
            keys = block(first, count)
            cache.update(keys, keys[..., :1] + 0.5 if layer == 1 else keys + 0.5, layer)
        if first == 0:
            cache.advance(5)
    cache.commit([[0, 3], [1]])
    keys, values = cache.layers[1].keys, cache.layers[1].values
    assert keys is not None and values is not None
    assert values.shape == (B, H, C, 1)
    assert torch.equal(values[:, :, :7] - 0.5, keys[:, :, :7, :1])
    assert keys[0, 0, :7, 0].tolist() == [0, 1, 2, 3, 4, 10, 13]
    assert [written(cache, layer, 0) for layer in (0, 2)] == [[0, 1, 2, 3, 4, 10, 13]] * 2


def test_a_larger_cache_copies_a_prefix_of_another() -> None:
    heads = (H, 1, H)
    old, new = KVCache(3, B, 8), KVCache(3, B, C)
    write(old, 0, 6, heads)
    old.advance(6)
    new.copy_prefix(old, 4)
    write(new, 50, 3, heads)
    new.advance(3)
    for layer in range(3):
        assert written(new, layer, 1) == [0, 1, 2, 3, 50, 51, 52]
        assert written(old, layer, 1) == [0, 1, 2, 3, 4, 5], "the old cache is unchanged"


def test_slots_never_written_hold_zeros() -> None:
    """Attention multiplies masked slots by 0, and 0 * NaN is NaN."""
    cache = KVCache(1, B, 6)
    write(cache, 1, 2)
    assert cache.layers[0].keys is not None
    assert bool((cache.layers[0].keys[:, :, 2:] == 0).all())


@pytest.mark.parametrize("kept", [[0], [1], [2], [0, 2], [1, 2], [0, 1]])
def test_dropping_rows_keeps_the_others_unchanged(kept: list[int]) -> None:
    """Rows have unequal lengths; later passes write the stored rows only, at their new indices."""
    cache, heads = KVCache(3, 3, C), (H, 1, H)

    def keys(first: int, count: int, layer: int, rows: list[int]) -> Tensor:
        number = 1000.0 * torch.tensor(rows)[:, None] + torch.arange(first, first + count)
        return number[:, None, :, None].expand(-1, heads[layer], -1, D)

    def step(first: int, count: int) -> list[Tensor]:
        return [
            cache.update(new, new + 0.5, layer)[0]
            for layer in range(3)
            for new in [keys(first, count, layer, cache.rows)]
        ]

    step(0, 5)
    cache.advance(5)
    step(10, 4)
    cache.commit([[0, 2], [1], [0, 1, 3]])
    cache.keep(kept)
    assert sorted(cache.rows) == kept
    expected = {0: [0, 1, 2, 3, 4, 10, 12], 1: [0, 1, 2, 3, 4, 11], 2: [0, 1, 2, 3, 4, 10, 11, 13]}
    seen = step(20, 2)
    cache.commit([[1], [0], [0, 1]])
    lengths = {0: 8, 1: 7, 2: 10}
    for added, row in zip(([21], [20], [20, 21]), range(3), strict=True):
        expected[row] += added
    assert cache.committed == [
        lengths[r] if r in kept else lengths[r] - len([[21], [20], [20, 21]][r]) for r in range(3)
    ]
    assert seen[0].shape[0] == len(kept)
    again = step(30, 1)
    for layer in range(3):
        for place, row in enumerate(cache.rows):
            values = again[layer][place, 0, : lengths[row] + 1, 0] - 1000 * row
            assert values.tolist() == [*expected[row], 30]
