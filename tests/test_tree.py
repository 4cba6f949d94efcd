"""DraftTree and the tree mask: a node attends to the committed prefix of its row, its ancestors and itself only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.tree import DraftTree
from msd.targets import State, Target


@st.composite
def parent_lists(draw: st.DrawFn, most: int = 8) -> list[int]:
    """Parents of up to `most` drafted nodes, each any earlier node."""
    size = draw(st.integers(0, most))
    return [draw(st.integers(0, i)) for i in range(size)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """(parents, start, committed) of 1 to 3 rows."""
    rows = draw(st.integers(1, 3))
    parents = [draw(parent_lists()) for _ in range(rows)]
    start = [draw(st.integers(0, 4)) for _ in range(rows)]
    committed = [draw(st.integers(s + 1, 9)) for s in start]
    return parents, start, committed


def make(parents: list[list[int]]) -> DraftTree:
    tokens = [[10 + i for i in range(len(p))] for p in parents]
    return DraftTree.from_lists(torch.arange(len(parents)), tokens, parents)


def walk(parents: list[int], node: int) -> set[int]:
    """`node` and all its ancestors, by a loop."""
    seen = {node}
    while node:
        node = parents[node - 1]
        seen.add(node)
    return seen


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny.llava())


@settings(deadline=None, derandomize=True)
@given(st.lists(parent_lists(), min_size=1, max_size=3))
def test_ancestors_equal_those_of_a_loop(parents: list[list[int]]) -> None:
    tree = make(parents)
    reach = tree.ancestors()
    for row, above in enumerate(parents):
        for node in range(len(above) + 1):
            assert set(reach[row, node].nonzero().flatten().tolist()) == walk(above, node)
            assert tree.depths[row, node] == len(walk(above, node)) - 1
    assert tree.height == int(tree.depths.max())


@settings(deadline=None, derandomize=True)
@given(st.lists(parent_lists(), min_size=1, max_size=3))
def test_rows_of_unequal_size_are_padded_with_invalid_nodes(parents: list[list[int]]) -> None:
    tree = make(parents)
    assert tree.size == 1 + max(map(len, parents))
    assert tree.valid.sum(1).tolist() == [1 + len(p) for p in parents]
    for row, above in enumerate(parents):
        assert tree.parents[row].tolist() == [-1, *above] + [-1] * (tree.size - 1 - len(above))
        padding = tree.size - 1 - len(above)
        assert tree.deterministic[row].tolist() == [False] + [True] * len(above) + [False] * padding


@settings(deadline=None, derandomize=True)
@given(batches())
def test_a_node_attends_to_its_prefix_its_ancestors_and_itself_only(
    target: Target, case: tuple[list[list[int]], list[int], list[int]]
) -> None:
    parents, start, committed = case
    tree = make(parents)
    cache = KVCache(1, len(parents), 64)
    cache.committed = list(committed)
    state: Any = SimpleNamespace(layout=SimpleNamespace(start=start), cache=cache)
    mask = target.tree_mask(state, tree)
    slots = max(committed) + tree.size
    if mask is None:
        mask = torch.zeros(len(parents), 1, tree.size, slots)
    assert mask.shape == (len(parents), 1, tree.size, slots)
    assert mask.dtype == target.model.dtype
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(mask.dtype).min}
    for row, above in enumerate(parents):
        prefix = set(range(start[row], committed[row]))
        for node in range(len(above) + 1):
            seen = set((mask[row, 0, node] == 0).nonzero().flatten().tolist())
            assert seen == prefix | {committed[row] + n for n in walk(above, node)}


def test_padding_nodes_attend_to_some_slot_so_that_attention_is_finite(target: Target) -> None:
    tree = make([[], [0, 1, 1]])
    layout = Layout.from_prompt(torch.full((2, 4), 5), 16)
    state = State(layout, KVCache(1, 2, 16))
    state.cache.committed = [3, 3]
    mask = target.tree_mask(state, tree)
    assert mask is not None
    assert bool((mask == 0).any(-1).all())


def test_plain_decoding_needs_no_mask_unless_rows_differ(target: Target) -> None:
    tree = DraftTree.root_only(torch.tensor([5, 6]))
    state = State(Layout.from_prompt(torch.full((2, 4), 5), 16), KVCache(1, 2, 16))
    state.cache.committed = [3, 3]
    assert target.tree_mask(state, tree) is None
    state.cache.committed = [3, 2]
    assert target.tree_mask(state, tree) is not None
    state.cache.committed, state.layout.start = [3, 3], [0, 1]
    assert target.tree_mask(state, tree) is not None


@settings(deadline=None, derandomize=True)
@given(parent_lists(), st.data())
def test_follow_finds_the_child_with_the_token(parents: list[int], data: st.DataObject) -> None:
    # children of one parent have different tokens, as drafters make them
    tokens = [10 + parents[:i].count(p) for i, p in enumerate(parents)]
    tree = DraftTree.from_lists(torch.tensor([1]), [tokens], [parents])
    node = data.draw(st.integers(0, len(parents)))
    token = data.draw(st.integers(9, 18))
    expected = [i + 1 for i, p in enumerate(parents) if p == node and tokens[i] == token] or [-1]
    found = tree.follow(torch.tensor([node]), torch.tensor([token]), tree.valid)
    assert found.tolist() == expected
    nobody = torch.zeros_like(tree.valid)
    assert tree.follow(torch.tensor([node]), torch.tensor([token]), nobody).tolist() == [-1]


def test_deterministic_is_kept() -> None:
    tree = DraftTree.from_lists(
        torch.tensor([1, 2]),
        [[5, 6], [7]],
        [[0, 0], [0]],
        deterministic=[[True, False], [False]],
    )
    assert tree.deterministic.tolist() == [[False, True, False], [False, False, False]]
    assert tree.tokens.tolist() == [[1, 5, 6], [2, 7, 0]]
    assert (tree.batch, tree.size, tree.height) == (2, 3, 1)


def test_select_rows_and_scatter_them_back() -> None:
    tree = make([[0, 1, 0], [], [0]])
    tree.q = torch.rand(tree.tokens.shape)
    assert tree.select([0, 1, 2]) is tree
    part = tree.select([2, 0])
    assert part.parents.tolist() == [tree.parents[2].tolist(), tree.parents[0].tolist()]
    back = part.scatter([2, 0], tree.tokens[:, 0])
    for name in ("tokens", "parents", "depths", "valid", "modality", "deterministic"):
        assert torch.equal(getattr(back, name), getattr(tree, name)), name
    assert back.q is not None
    assert back.q[[0, 2]].tolist() == tree.q[[0, 2]].tolist()
    assert back.q[1].tolist() == [1.0, 0.0, 0.0, 0.0]
