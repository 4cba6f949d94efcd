"""`Repeats` drafts the continuation of long repeats: the output is the target's, the drafts come from the text."""

from __future__ import annotations

import pytest
import torch

import rivals
import tiny
from msd.config import SpeculativeConfig
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree
from msd.drafters import auxiliary
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget
from msd.targets.state import State
from random_drafter import RandomDrafter

MODEL = tiny.llava()
VOCABULARY = MODEL.config.text_config.vocab_size


class Noting(Repeats):
    """Records its budgets and trees."""

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        tree = super().propose(state, budget, sampler)
        self.trees = [*getattr(self, "trees", []), (budget, tree)]
        return tree


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("least", [2, 4])
def test_output_is_the_targets(rows: int, least: int) -> None:
    made = Noting(RandomDrafter(5, VOCABULARY), least)
    assert made.name == "random+prompt-lookup"
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=7, depth=5, backend="plain"), made)
    inputs = rivals.prompts(rows)
    L = inputs["input_ids"].shape[1]
    plain = MODEL.generate(**inputs, max_new_tokens=40, do_sample=False)[:, L:].tolist()
    results = engine.generate(**inputs, max_new_tokens=40, do_sample=False)
    for row, result in enumerate(results if isinstance(results, list) else [results]):
        assert result.tokens == plain[row][: len(result.tokens)]
        assert result.finish == "length" or result.tokens[-1] == tiny.EOS
    for budget, tree in made.trees:
        assert tree.size <= budget.nodes + 1
        assert all(int(d[v].max()) <= limit for d, v, limit in zip(tree.depths, tree.valid, budget.depth, strict=True))


def test_repeats_are_drafted_by_lookup() -> None:
    """One row ends with a repeat and drafts by lookup; the other row drafts with the drafter."""
    phrase = [12, 30, 17, 25, 33, 19]
    repeating = [*phrase, 41, 42, 43, 44, *phrase]
    ids = torch.tensor([repeating, list(range(10, 10 + len(repeating)))])
    made = Noting(RandomDrafter(1, VOCABULARY), 5)
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(backend="plain", adaptive=False), made)
    state, scores = engine.target.prefill(ids, {"attention_mask": torch.ones_like(ids)}, ids.shape[1] + 8)
    made.begin(state, scores)
    sampler = Sampler.__new__(Sampler)  # neither drafter samples
    seen = set()
    for _ in range(20):
        tree = made.propose(state, Budget(4, [4, 4]), sampler)
        drafted, other = (tree.valid.sum(1) - 1).tolist()
        assert tree.tokens[0, 1 : drafted + 1].tolist() == [41, 42, 43, 44][:drafted]
        assert drafted == (min(4, tree.size - 1) if other else 4)  # as wide as the other row's tree
        seen.add(other > 0)
    assert seen == {True, False}


def test_trees_of_some_rows_replaced() -> None:
    newest = torch.tensor([1, 2, 3])
    mine = DraftTree.from_lists(newest, [[5, 6], [7], []], [[0, 1], [0], []])
    other = DraftTree.from_lists(newest, [[], [8, 9, 4], [11]], [[], [0, 1, 2], [0]])
    mixed = mine.replace_rows([1, 2], other)
    assert mixed.tokens.tolist() == [[1, 5, 6], [2, 8, 9], [3, 11, 0]]
    assert mixed.parents.tolist() == [[-1, 0, 1], [-1, 0, 1], [-1, 0, -1]]
    assert mixed.valid.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert mixed.height == 2


def test_auxiliary_source_and_thresholds_are_the_drafters() -> None:
    class Reading(RandomDrafter):
        auxiliary_source = None

        def share_vision_tower(self, encode: object) -> None:
            self.auxiliary_source, self.encode = "events", encode  # type: ignore[assignment]

        def thresholds(self, epsilon: float) -> dict[str, float]:
            return {"vision": epsilon}

    without, reading = Repeats(RandomDrafter(1, 9)), Repeats(Reading(1, 9))
    for each in (without, reading):
        each.share_vision_tower(len)  # type: ignore[arg-type]
    assert without.auxiliary_source is None and reading.auxiliary_source == "events"
    assert auxiliary.encoder(without, "events") is None and reading.encode([1, 2]) == 2
    assert without.thresholds(0.1) == {} and reading.thresholds(0.1) == {"vision": 0.1}
