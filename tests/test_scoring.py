"""Scoring a tree in one pass gives what `transformers` gives for every root-to-leaf path alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from msd.core.tree import Accepted, DraftTree, Scores
from msd.errors import UserError
from msd.targets import State, Target, adapt, supported

TOLERANCE = 1e-4
Inputs = dict[str, Tensor]

LLAVA_ROWS = [tiny.llava_inputs(1, images=1), tiny.llava_inputs(2, images=2, words=8), tiny.llava_inputs(3, images=0)]
NEXT_ROWS = [tiny.llava_next_inputs(1), tiny.llava_next_inputs(2, words=7)]
CASES = [
    pytest.param(tiny.llava, LLAVA_ROWS[:1], id="llava-1"),
    pytest.param(tiny.llava, LLAVA_ROWS, id="llava-3"),
    pytest.param(tiny.llava_next, NEXT_ROWS[:1], id="llava_next-1"),
    pytest.param(tiny.llava_next, NEXT_ROWS, id="llava_next-2"),
]


def start(target: Target, rows: list[Inputs], capacity: int = 96) -> tuple[State, Scores]:
    """A prefilled batch whose newest token, as in the loop, is not in the cache yet."""
    inputs = tiny.batch(*rows) if len(rows) > 1 else dict(rows[0])
    inputs = target.encode_images(inputs)
    with torch.no_grad():
        state, scores = target.prefill(inputs.pop("input_ids"), inputs, capacity)
    for row, token in enumerate(scores.logits[:, -1].argmax(-1).tolist()):
        state.layout.append(row, [token])
    return state, scores


def random_lists(seed: int, rows: int, nodes: int = 7) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, parents) of random trees; row i has `nodes` - 2i drafted nodes."""
    rng = random.Random(seed)
    sizes = [max(0, nodes - 2 * row) for row in range(rows)]
    return [[rng.randrange(4, 64) for _ in range(n)] for n in sizes], [
        [rng.randint(0, i) for i in range(n)] for n in sizes
    ]


def path_to(parents: list[int], node: int) -> list[int]:
    """Drafted nodes from the root (left out) down to `node`."""
    path: list[int] = []
    while node:
        path.insert(0, node)
        node = parents[node - 1]
    return path


@torch.no_grad()
def alone(model: Any, row: Inputs, emitted: list[int]) -> Any:
    """`transformers`' own forward pass of one unpadded prompt and what followed, without a cache."""
    ids = torch.cat([row["input_ids"], torch.tensor([emitted], dtype=torch.long)], 1)
    inputs = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model(**inputs, use_cache=False, output_hidden_states=True)


def check_tree(target: Target, rows: list[Inputs], state: State, seed: int) -> tuple[DraftTree, Scores]:
    """Scores a random tree and compares every node with its path alone."""
    tokens, parents = random_lists(seed, len(rows))
    tree = DraftTree.from_lists(state.layout.newest(), tokens, parents)
    with torch.no_grad():
        scores = target.score(state, tree)
    assert scores.logits.shape[:2] == (len(rows), tree.size)
    for row, inputs in enumerate(rows):
        emitted = state.layout.history(row)[-(state.layout.end[row] - start_of(state, row, inputs)) :].tolist()
        for node in range(len(tokens[row]) + 1):
            path = path_to(parents[row], node)
            expected = alone(target.model, inputs, emitted + [tokens[row][n - 1] for n in path])
            difference = (scores.logits[row, node] - expected.logits[0, -1]).abs().max()
            assert difference <= TOLERANCE, f"row {row}, node {node}"
            if scores.taps is not None:
                taps = torch.cat([expected.hidden_states[i][0, -1] for i in target.taps.indices])
                assert (scores.taps[row, node] - taps).abs().max() <= TOLERANCE
    return tree, scores


def start_of(state: State, row: int, inputs: Inputs) -> int:
    """First column after the prompt."""
    return state.layout.start[row] + inputs["input_ids"].shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make, rows", CASES)
def test_tree_scores_are_those_of_each_path_alone(make: Any, rows: list[Inputs], attention: str) -> None:
    model = make()
    model.set_attn_implementation(attention)
    target = adapt(model)
    state, prompt = start(target, rows)
    for row, inputs in enumerate(rows):
        assert (prompt.logits[row, -1] - alone(model, inputs, []).logits[0, -1]).abs().max() <= TOLERANCE
    check_tree(target, rows, state, seed=1)


@pytest.mark.parametrize("make, rows", CASES)
def test_after_a_commit_rows_go_on_as_if_their_text_had_been_typed(make: Any, rows: list[Inputs]) -> None:
    """Three steps that accept an arbitrary, per-row different path each."""
    target = adapt(make())
    state, _ = start(target, rows)
    rng = random.Random(5)
    for step in range(3):
        tree, _ = check_tree(target, rows, state, seed=10 + step)
        paths = [path_to(tree.parents[r, 1:].tolist(), rng.randint(0, tree.size - 1 - 2 * r)) for r in range(len(rows))]
        emitted = [[*tree.tokens[r, p].tolist(), rng.randrange(4, 64)] for r, p in enumerate(paths)]
        for row, tokens in enumerate(emitted):
            state.layout.append(row, tokens)
        target.commit(state, Accepted(paths, emitted))
        assert state.cache.committed == [e - 1 for e in state.layout.end]
    assert len(set(state.layout.end)) == len(rows), "the rows should have gone apart"
    check_tree(target, rows, state, seed=20)


def test_a_finished_row_neither_moves_nor_disturbs_the_others() -> None:
    rows = LLAVA_ROWS[:2]
    target = adapt(tiny.llava())
    state, _ = start(target, rows)
    before = list(state.cache.committed)
    tree, _ = check_tree(target, rows, state, seed=1)
    state.layout.append(0, [*tree.tokens[0, [1]].tolist(), 9])
    target.commit(state, Accepted([[1], []], [[int(tree.tokens[0, 1]), 9], []]))
    assert state.cache.committed == [before[0] + 2, before[1]]
    check_tree(target, rows, state, seed=2)


@pytest.mark.parametrize("make, rows", CASES)
def test_rows_that_are_let_go_leave_the_scores_of_the_others(make: Any, rows: list[Inputs]) -> None:
    """All but the first row, then none but the last: what a batch computes as its rows end."""
    target = adapt(make(), taps=(0, 2))
    state, _ = start(target, rows)
    last = len(rows) - 1
    for left in (list(range(min(1, last), last + 1)), [last]):
        tokens, parents = random_lists(3, len(rows))
        tree = DraftTree.from_lists(state.layout.newest(), tokens, parents)
        with torch.no_grad():
            whole = target.score(state, tree)
            state.cache.keep(left)
            some = target.score(state, tree)
        assert whole.taps is not None and some.taps is not None
        there = tree.valid[left]
        assert (whole.logits[left] - some.logits[left])[there].abs().max() <= TOLERANCE
        assert (whole.taps[left] - some.taps[left])[there].abs().max() <= TOLERANCE
        emitted = [tree.tokens[row, :1].tolist() if row in left else [] for row in range(len(rows))]
        for row in left:
            state.layout.append(row, emitted[row])
        target.commit(state, Accepted([[] for _ in rows], emitted))


@pytest.mark.parametrize("make, rows", CASES)
def test_taps_are_the_hidden_states_of_transformers(make: Any, rows: list[Inputs]) -> None:
    target = adapt(make(), taps=(0, 2, 3))
    state, prompt = start(target, rows)
    assert prompt.taps is not None
    for row, inputs in enumerate(rows):
        hidden = alone(target.model, inputs, []).hidden_states
        expected = torch.cat([hidden[i][0] for i in (0, 2, 3)], dim=-1)  # [L, 3H]
        real = prompt.taps[row, state.layout.start[row] :]
        assert real.shape == expected.shape
        assert (real - expected).abs().max() <= TOLERANCE
    check_tree(target, rows, state, seed=3)


def test_without_taps_nothing_is_recorded() -> None:
    target = adapt(tiny.llava())
    state, prompt = start(target, LLAVA_ROWS[:1])
    assert prompt.taps is None
    with torch.no_grad():
        assert target.score(state, DraftTree.root_only(state.layout.newest())).taps is None


def test_a_tap_outside_of_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"tap 4 .*\(0 to 3\)"):
        adapt(tiny.llava(), taps=(4,))


def test_an_architecture_without_adapter_is_refused() -> None:
    model = tiny.llava()
    assert {"llava", "llava_next"} <= set(supported())
    with pytest.raises(UserError, match=r"llama.*llava"):
        adapt(model.model.language_model)


def test_the_target_knows_its_placeholder_and_context() -> None:
    target = adapt(tiny.llava())
    assert list(target.placeholders) == [tiny.IMAGE]
    assert target.context_length == 512
