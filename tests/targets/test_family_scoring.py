"""Every family: tree scores and teacher passes equal the logits of each path alone.

Alone means `transformers`' own forward pass over one unpadded prompt and the tokens after it, without a cache.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from families import BY_NAME, NAMES
from family import Family, Part
from family_layouts import VOCABULARY, WORDS
from family_models import WINDOW
from msd.core.modality import LANGUAGE
from msd.core.tree import Accepted, DraftTree, Scores
from msd.targets import State, Target, adapt
from msd.targets.teacher import run_teacher

TOLERANCE = 1e-4
TAPS = (1, 3)


@cache
def model(name: str) -> Any:
    return BY_NAME[name].make()


def prompts(family: Family) -> list[list[Part]]:
    """Three of unequal length and with different numbers of images, and a video where the family supports it."""
    kind = family.kinds[0]
    return [family.parts(1, [kind]), family.parts(2, [kind, kind], words=8), family.parts(3, family.mixed, words=10)]


@torch.no_grad()
def alone(family: Family, parts: list[Part], emitted: list[int]) -> Any:
    row = family.row(parts)
    more = torch.tensor([emitted], dtype=torch.long)
    row["input_ids"] = torch.cat([row["input_ids"], more], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for types in family.types:  # answer tokens have the causal type
        row[types] = torch.cat([row[types], torch.full_like(more, int(family.opens))], 1)
    return model(family.name)(**row, use_cache=False, output_hidden_states=True)


def start(family: Family, target: Target, rows: list[list[Part]]) -> State:
    """A prefilled batch whose newest token is not in the cache yet. Checks the scores of the prompts."""
    inputs = target.encode_images(family.batch(rows))
    with torch.no_grad():
        state, scores = target.prefill(inputs.pop("input_ids"), inputs, 128)
    for row, parts in enumerate(rows):
        expected = alone(family, parts, [])
        assert (scores.logits[row, -1] - expected.logits[0, -1]).abs().max() <= TOLERANCE, f"prompt {row}"
        check_taps(target, scores.taps[row, -1], expected)
        state.layout.append(row, [WORDS + row])
    return state


def check_taps(target: Target, taps: Tensor, expected: Any) -> None:
    """Compares them with the hidden states of the last position."""
    states = torch.cat([expected.hidden_states[i][0, -1] for i in target.taps.indices])
    assert (taps - states).abs().max() <= TOLERANCE * states.abs().max()


def path_to(parents: list[int], node: int) -> list[int]:
    """Drafted nodes from the root (excluded) to `node`."""
    path: list[int] = []
    while node:
        path.insert(0, node)
        node = parents[node - 1]
    return path


def check_tree(family: Family, target: Target, rows: list[list[Part]], state: State, seed: int) -> DraftTree:
    """Scores random trees of 6, 5 and 4 drafted nodes and compares each node with its path alone."""
    rng = random.Random(seed)
    sizes = [6 - row for row in range(len(rows))]
    tokens = [[rng.randrange(WORDS, VOCABULARY) for _ in range(n)] for n in sizes]
    parents = [[rng.randint(max(0, i - 2), i) for i in range(n)] for n in sizes]
    tree = DraftTree.from_lists(state.layout.newest(), tokens, parents)
    with torch.no_grad():
        scores: Scores = target.score(state, tree)
    for row, parts in enumerate(rows):
        prompt = state.layout.start[row] + family.row(parts)["input_ids"].shape[1]
        emitted = state.layout.history(row)[prompt:].tolist()
        for node in range(len(tokens[row]) + 1):
            path = path_to(parents[row], node)
            expected = alone(family, parts, emitted + [tokens[row][n - 1] for n in path])
            difference = (scores.logits[row, node] - expected.logits[0, -1]).abs().max()
            assert difference <= TOLERANCE, f"row {row}, node {node}"
            check_taps(target, scores.taps[row, node], expected)
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_trees_of_a_padded_batch_before_and_after_commits(name: str) -> None:
    """Each row accepts its own path, twice."""
    family = BY_NAME[name]
    rows = prompts(family)
    target = adapt(model(name), TAPS, backend="plain")
    state = start(family, target, rows)
    rng = random.Random(5)
    for step in range(3):
        tree = check_tree(family, target, rows, state, seed=step)
        paths = [path_to(tree.parents[r, 1:].tolist(), rng.randint(0, 6 - r)) for r in range(len(rows))]
        emitted = [[*tree.tokens[r, p].tolist(), rng.randrange(WORDS, VOCABULARY)] for r, p in enumerate(paths)]
        for row, tokens in enumerate(emitted):
            state.layout.append(row, tokens)
        target.commit(state, Accepted(paths, emitted))
    assert len(set(state.layout.end)) > 1, "the rows should differ in length"


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3_window"])
def test_a_tree_deeper_than_a_window(name: str) -> None:
    """Two interleaved chains: the distance to an ancestor in slots is twice the distance in columns."""
    family = BY_NAME[name]
    rows = [family.parts(1, ["image"])]
    target = adapt(model(name), TAPS, backend="plain")
    state = start(family, target, rows)
    tokens = [random.Random(3).randrange(WORDS, VOCABULARY) for _ in range(2 * WINDOW + 8)]
    parents = [max(0, i - 1) for i in range(len(tokens))]
    tree = DraftTree.from_lists(state.layout.newest(), [tokens], [parents])
    assert tree.height > WINDOW
    with torch.no_grad():
        scores = target.score(state, tree)
    for node in range(0, len(tokens) + 1, 5):
        path = path_to(parents, node)
        expected = alone(family, rows[0], [WORDS, *(tokens[n - 1] for n in path)])
        assert (scores.logits[0, node] - expected.logits[0, -1]).abs().max() <= TOLERANCE, f"node {node}"


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention(name: str) -> None:
    family = BY_NAME[name]
    eager = family.make()
    eager.set_attn_implementation("eager")
    target = adapt(eager, TAPS, backend="plain")
    check_tree(family, target, prompts(family)[:1], start(family, target, prompts(family)[:1]), seed=9)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_pass_equals_each_prefix_alone(name: str) -> None:
    """Training and labelling use the logits of decoding; with the image masked they differ."""
    family = BY_NAME[name]
    rows = prompts(family)
    target = adapt(model(name), TAPS, backend="plain")
    answers = [[20, 31, 12, 44, 50], [33, 10], [11, 60, 23]]
    taught = run_teacher(target, family.batch(rows), answers)
    columns = taught.layout.modality[:, : taught.prompt] != LANGUAGE.id
    blind = run_teacher(target, family.batch(rows), answers, columns)
    for row, parts in enumerate(rows):
        shown = bool((taught.layout.modality[row] != LANGUAGE.id).any())
        for t in range(len(answers[row])):
            expected = alone(family, parts, answers[row][:t])
            assert (taught.logits[row, t] - expected.logits[0, -1]).abs().max() <= TOLERANCE, f"row {row}, token {t}"
            check_taps(target, taught.taps[row, taught.prompt + t - 1], expected)
            changed = float((blind.logits[row, t] - expected.logits[0, -1]).abs().max())
            assert changed > 1e-3 if shown else changed <= TOLERANCE
