"""Lossless verification of trees whose correct answer is known by hand or from plain decoding; no statistics."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, SampledCandidates, Scores
from msd.verify import Lossless

V = 5
TARGET = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 2  # logits after each token
LAST = V - 1


def make_sampler(
    rows: int = 1,
    do_sample: bool = False,
    room: int = 20,
    eos: int = -1,
    seed: int = 0,
    history: bool = True,
    time: float | None = None,
) -> Sampler:
    """Rows with the prompt [1]. history: a logits processor depends on the whole path. time: limit in seconds."""
    layout = Layout.from_prompt(torch.ones(rows, 1, dtype=torch.long), room + 8)
    criteria = StoppingCriteriaList([MaxLengthCriteria(1 + room), EosTokenCriteria(torch.tensor([eos]))])
    criteria += [] if time is None else [MaxTimeCriteria(time)]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)] if history else [])
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return Sampler(layout, processors, criteria, do_sample, V, generators)


def plain(row: int, steps: int, **kwargs: Any) -> list[int]:
    """Plain decoding, one token at a time."""
    sampler = make_sampler(row + 1, **kwargs)
    for _ in range(steps):
        distribution = sampler.logits(TARGET[sampler.layout.newest()[row]][None], [row])
        if not sampler.emit(row, int(sampler.draw(distribution, [row])[0])):
            break
    return sampler.layout.history(row)[1:].tolist()


def random_tree(rng: random.Random, size: int, depth: int = 6) -> tuple[list[int], list[int]]:
    """(tokens, parents) of a random tree; siblings have different tokens, as drafters make them."""
    tokens: list[int] = []
    parents: list[int] = []
    level = [0]
    for _ in range(size):
        parent, token = rng.randint(0, len(tokens)), rng.randrange(V)
        if level[parent] < depth and (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
            level.append(level[parent] + 1)
    return tokens, parents


def longest(tokens: list[int], parents: list[int], answer: list[int]) -> list[int]:
    """The path of the tree with the longest prefix of `answer`."""
    node, path = 0, []
    for token in answer:
        below = [i + 1 for i, (p, t) in enumerate(zip(parents, tokens, strict=True)) if p == node and t == token]
        if not below:
            break
        node = below[0]
        path.append(node)
    return path


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 10**6), do_sample=st.booleans(), eos=st.sampled_from([-1, 0, 2]), room=st.integers(1, 8),
    history=st.booleans(), time=st.sampled_from([None, 1e9, -1.0]),
)  # fmt: skip
def test_deterministic_trees_give_the_tokens_of_plain_decoding(
    seed: int, do_sample: bool, eos: int, room: int, history: bool, time: float | None
) -> None:
    """Greedy and with the same seeds, for three rows with trees of unequal size, EOS and short length limits."""
    rng = random.Random(seed)
    sampler = make_sampler(3, do_sample, room, eos, seed, history, time)
    assert sampler.reads_logits_only == (not do_sample and not history)
    trees = [random_tree(rng, rng.randint(0, 40)) for _ in range(3)]
    tree = DraftTree.from_lists(sampler.layout.newest(), [t for t, _ in trees], [p for _, p in trees])
    accepted = Lossless().accept(tree, Scores(TARGET[tree.tokens]), sampler)
    for row, (tokens, parents) in enumerate(trees):
        answer = plain(row, 10, do_sample=do_sample, room=room, eos=eos, seed=seed, history=history, time=time)
        path = longest(tokens, parents, answer)
        assert accepted.nodes[row] == path
        assert accepted.tokens[row] == answer[: len(path) + 1]
        assert sampler.layout.history(row)[1:].tolist() == accepted.tokens[row]
        stopped = sampler.finish[row] is not None
        assert stopped == (len(answer) < 10 and len(accepted.tokens[row]) == len(answer))
        assert len(accepted.tokens[row]) == len(path) + 1 or (stopped and len(accepted.tokens[row]) == len(path))


@pytest.mark.parametrize("history", [True, False])
def test_a_finished_row_emits_nothing(history: bool) -> None:
    sampler = make_sampler(2, eos=0, history=history)
    sampler.emit(0, 0)
    tree = DraftTree.from_lists(sampler.layout.newest(), [[1, 2], [3]], [[0, 1], [0]])
    accepted = Lossless().accept(tree, Scores(TARGET[tree.tokens]), sampler)
    assert (accepted.nodes[0], accepted.tokens[0]) == ([], [])
    assert accepted.tokens[1]
    assert sampler.layout.end[0] == 2


def with_candidates(tokens: list[int], distributions: Tensor, deterministic: int = 0) -> DraftTree:
    """A root with children `tokens`: `deterministic` deterministic ones, then one per row of `distributions`."""
    n, sampled = len(tokens), len(tokens) - deterministic
    child, distribution = torch.full((1, 1 + n, sampled), -1), torch.zeros(1, 1 + n, sampled, dtype=torch.long)
    child[0, 0], distribution[0, 0] = torch.arange(1 + deterministic, 1 + n), torch.arange(sampled)
    marks = [[i < deterministic for i in range(n)]]
    return DraftTree.from_lists(
        torch.tensor([1]), [tokens], [[0] * n], SampledCandidates(child, distribution, distributions[None]), marks
    )


class Fixed(Sampler):
    """A sampler whose uniform numbers are all `number`."""

    number = 0.5

    def uniform(self, rows: list[int], device: torch.device) -> Tensor:
        return torch.full((len(rows),), self.number, dtype=torch.float64)


def run(tree: DraftTree, p: Tensor, number: float, draws: int = 1) -> list[Accepted]:
    """Accepts `tree` when every uniform number is `number` and the target's distribution at each node is p [V]."""
    out = []
    for seed in range(draws):
        layout = Layout.from_prompt(torch.ones(1, 1, dtype=torch.long), 8)
        criteria = StoppingCriteriaList([MaxLengthCriteria(2)])
        sampler = Fixed(layout, LogitsProcessorList(), criteria, True, V, [torch.Generator().manual_seed(seed)])
        sampler.number = number
        out.append(Lossless().accept(tree, Scores(p.log().expand(1, tree.size, V)), sampler))
    return out


P = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
Q = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("number, accepted", [(0.2, True), (0.249, True), (0.251, False), (0.9, False)])
def test_a_candidate_is_accepted_with_probability_p_over_q(number: float, accepted: bool) -> None:
    (result,) = run(with_candidates([0], Q[None]), P, number)  # p/q = 0.25
    assert (result.nodes == [[1]]) is accepted
    assert not accepted or result.tokens == [[0]]


def test_the_recovered_token_comes_from_the_residual() -> None:
    """norm(max(p - q, 0)) = [0, 0, 1/4, 3/4, 0]."""
    tokens = [r.tokens[0][0] for r in run(with_candidates([0], Q[None]), P, 0.9, draws=400)]
    assert set(tokens) == {2, 3}
    assert 0.66 < tokens.count(3) / 400 < 0.84


@pytest.mark.parametrize("number, node", [(0.2, 1), (0.3, 2), (0.99, 2)])
def test_candidates_are_tried_in_order_against_the_residual(number: float, node: int) -> None:
    """Token 0 is kept below u = 0.25; then token 3 has residual 3/4, far above its q of 0.1: always accepted."""
    (result,) = run(with_candidates([0, 3], Q.expand(2, V)), P, number)
    assert result.nodes == [[node]]


def test_a_token_with_p_zero_is_never_accepted() -> None:
    q = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    for result in run(with_candidates([4], q[None]), P, 0.0, draws=5):
        assert result.nodes == [[]]
        assert result.tokens[0][0] != 4


def test_deterministic_candidates_are_removed_from_p_before_the_sampled_ones() -> None:
    """Given that 3 was not drawn, p is [1/6, 1/3, 1/2, 0, 0]: token 2 against q = 0.2 is always accepted."""
    nodes = [r.nodes[0] for r in run(with_candidates([3, 2], Q[None], deterministic=1), P, 0.99, draws=300)]
    assert {tuple(n) for n in nodes} == {(1,), (2,)}
    assert 0.3 < nodes.count([1]) / 300 < 0.5


def test_a_draft_distribution_equal_to_p_but_for_rounding_has_a_residual() -> None:
    """q's rounding error is above p's at every token, so max(p - q, 0) is zero everywhere after the rejection."""
    (result,) = run(with_candidates([0], (P * 1.000001)[None]), P, 1 - 1e-12)
    assert result.nodes == [[]]
    assert 0 <= result.tokens[0][0] < LAST


def test_sampled_candidates_are_plain_drafts_in_greedy_decoding() -> None:
    sampler = make_sampler(do_sample=False)
    best = plain(0, 1)[0]
    wrong = (best + 1) % V
    result = Lossless().accept(
        with_candidates([wrong, best], Q.expand(2, V)), Scores(TARGET[torch.tensor([[1, wrong, best]])]), sampler
    )
    assert result.nodes == [[2]]
    assert result.tokens == [[best, *plain(0, 2)[1:]]]
