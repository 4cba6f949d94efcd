"""Sampler: processed distributions of each row's own text, draws as `generate()` makes them, and stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores
from msd.planning.plan import Plan
from msd.verify import Lossless

V = 16
LONG, SHORT = [5, 6, 7, 5, 6], [8, 9]
EMITTED = [11, 8, 6, 8]  # after a row's first token comes what padding, were it read, would call a repeated pair
PADDED = torch.tensor([LONG, [0, 0, 0, *SHORT]])
MASK = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])


def sampler(
    ids: Tensor,
    mask: Tensor | None = None,
    *processors: LogitsProcessor,
    criteria: Any = (),
    seed: int = 0,
    **options: Any,
) -> Sampler:
    layout = Layout.from_prompt(ids, ids.shape[1] + 8, mask)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(ids))]
    options = {"do_sample": True, "vocabulary": V, "randomness": generators, **options}
    return Sampler(layout, LogitsProcessorList(processors), StoppingCriteriaList(criteria), **options)


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def processors(ids: Tensor) -> dict[str, list[LogitsProcessor]]:
    """Processors that depend on the history, as `generate()` would build them for the prompt `ids` [B, L]."""
    L = ids.shape[1]
    return {
        "repetition": [RepetitionPenaltyLogitsProcessor(1.5)],
        "repetition-of-output": [RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=L)],
        "repetition-of-output-per-row": [
            RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.full((len(ids),), L))
        ],
        "ngram": [NoRepeatNGramLogitsProcessor(2)],
        "bad-words": [NoBadWordsLogitsProcessor([[9, 11], [6, 7], [8, 8, 9, 11], [3]])],
        "bias": [SequenceBiasLogitsProcessor([[[9, 11], 5.0], [[8, 8, 9, 3], 5.0]])],
        "prompt-repetition": [EncoderRepetitionPenaltyLogitsProcessor(1.5, ids)],
        "prompt-ngram": [EncoderNoRepeatNGramLogitsProcessor(2, ids)],
        "mixed": [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)],
    }


@pytest.mark.parametrize("name", processors(PADDED))
def test_a_padded_row_has_the_distribution_it_has_alone(name: str) -> None:
    together = sampler(PADDED, MASK, *processors(PADDED)[name])
    raw = logits(2)
    untouched = raw.clone()
    for step in range(5):
        distribution = together.logits(raw, [0, 1])
        for row, text in enumerate([LONG, SHORT]):
            ids = torch.tensor([text])
            alone = sampler(ids, None, *processors(ids)[name])
            for token in EMITTED[:step]:
                alone.emit(0, token)
            assert torch.equal(distribution[row], alone.logits(raw[row, None], [0])[0]), (row, step)
        for row in (0, 1):
            together.emit(row, (*EMITTED, 0)[step])
    assert torch.equal(raw, untouched), "the raw logits are not modified"


@pytest.mark.parametrize("name", processors(PADDED))
def test_the_processors_above_do_change_the_distribution(name: str) -> None:
    alone = sampler(PADDED[:1], None, *processors(PADDED[:1])[name])
    changed = False
    for token in (9, 6, 7):
        alone.emit(0, token)
        changed |= not torch.equal(alone.logits(logits(1), [0]), logits(1))
    assert changed


def test_each_row_uses_its_own_prompt() -> None:
    """Rows of `num_return_sequences` outnumber the prompts that `generate()` gives these processors."""
    ids = torch.tensor([LONG, LONG])
    for name in ("prompt-repetition", "prompt-ngram"):
        together = sampler(ids, None, *processors(ids[:1])[name])
        alone = sampler(ids[:1], None, *processors(ids[:1])[name])
        raw = logits(1).expand(2, -1)
        assert torch.equal(together.logits(raw, [0, 1]), alone.logits(raw[:1], [0]).expand(2, -1))


class Memory(LogitsProcessor):
    """Forbids as many tokens as it had calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.index_fill(1, torch.arange(self.calls), -torch.inf)


def test_a_stateful_processor_has_one_state_per_row() -> None:
    both = sampler(PADDED, MASK, Memory())
    for step in range(1, 4):
        assert both.logits(logits(2), [0, 1]).isinf().sum(1).tolist() == [step, step]


def test_prefix_constraints_get_their_row_index() -> None:
    allowed = [[3, 4], [5]]
    both = sampler(PADDED, MASK, PrefixConstrainedLogitsProcessor(lambda row, tokens: allowed[row], num_beams=1))
    distribution = both.logits(logits(2), [0, 1])
    assert [row.isfinite().nonzero().flatten().tolist() for row in distribution] == allowed
    assert both.logits(logits(1), [1])[0].isfinite().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("warpers", [[], [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.8)]])
def test_pointwise_distributions_of_all_rows_at_once(warpers: list[LogitsProcessor]) -> None:
    both = sampler(PADDED, MASK, *warpers)
    raw = logits(2)
    expected = LogitsProcessorList(warpers)(PADDED, raw.clone())
    assert torch.equal(both.logits(raw, [0, 1]), expected)
    assert torch.equal(both.logits(raw[1:], [1]), expected[1:])


class Spy(LogitsProcessor):
    """Stores the tokens that it was given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids[0].tolist())
        return scores


def test_processors_run_only_on_nodes_of_the_walk_and_get_their_path() -> None:
    spy = Spy()
    one = sampler(torch.tensor([LONG]), None, spy, do_sample=False)
    tree = DraftTree.from_lists(one.layout.newest(), [[3, 4, 9, 10, 11]], [[0, 0, 2, 2, 3]])
    raw = torch.full((1, 6, V), -1.0)
    raw[0, torch.arange(6), torch.tensor([4, 1, 9, 12, 1, 1])] = 1.0  # the argmax is 4, 9, 12
    accepted = Lossless().accept(tree, Scores(raw), one)
    assert accepted.nodes == [[2, 3]]
    assert accepted.tokens == [[4, 9, 12]]
    assert spy.seen == [LONG, [*LONG, 4], [*LONG, 4, 9]]


def test_draws_are_those_of_multinomial_with_the_row_generator() -> None:
    both = sampler(PADDED, MASK, seed=7)
    p = logits(2).softmax(-1)
    one, two = (torch.Generator().manual_seed(s) for s in (7, 8))
    assert both.draw(logits(2), [0, 1]).tolist() == [
        int(torch.multinomial(p[:1], 1, generator=one)), int(torch.multinomial(p[1:], 1, generator=two))
    ]  # fmt: skip
    assert both.draw(logits(2)[1:], [1]).tolist() == [int(torch.multinomial(p[1:], 1, generator=two))]
    u = both.uniform([0, 1], torch.device("cpu"))
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())


def test_greedy_draws_the_argmax_and_uses_no_randomness() -> None:
    greedy = sampler(PADDED, MASK, do_sample=False, randomness=None)
    state = torch.get_rng_state()
    assert greedy.draw(logits(2), [0, 1]).tolist() == logits(2).argmax(-1).tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_finish_independently() -> None:
    criteria = [MaxLengthCriteria(8), EosTokenCriteria(torch.tensor([2, 3]))]
    both = sampler(PADDED, MASK, criteria=criteria)
    assert (both.tokens_left(0), both.alive) == (3, [0, 1])
    assert both.emit(0, 9)
    assert not both.emit(1, 3)
    assert (both.alive, both.finish) == ([0], [None, "eos"])
    assert both.emit(0, 9)
    assert not both.emit(0, 9)
    assert (both.alive, both.finish, both.tokens_left(0)) == ([], ["length", "eos"], 0)


def test_a_plan_never_drafts_more_than_may_be_emitted() -> None:
    both = sampler(PADDED, MASK, criteria=[MaxLengthCriteria(9), EosTokenCriteria(torch.tensor([2]))])
    assert Plan(nodes=8, depth=6).budget(both).depth == [3, 3]
    assert Plan(nodes=8, depth=2).budget(both).depth == [2, 2]
    both.emit(0, 2)
    both.emit(1, 9)
    assert Plan(nodes=8, depth=6).budget(both).depth == [0, 2]
