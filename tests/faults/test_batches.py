"""Batches equal those of `generate()`, with custom processors that compare rows and with shared random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import tiny
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result
from random_drafter import RandomDrafter

NEW = 16
ALWAYS = SpeculativeConfig(adaptive=False)  # the number of drafts must not depend on measured time
ROWS = [tiny.llava_inputs(1, images=1), tiny.llava_inputs(2, images=2, words=8), tiny.llava_inputs(3, images=0)]
BATCH = tiny.batch(*ROWS)
L = BATCH["input_ids"].shape[1]


@cache
def model() -> Any:
    return tiny.llava(sharpness=10.0)


class BiasPerRow(LogitsProcessor):
    """A bias [B, V] that differs between rows."""

    def __init__(self, rows: int) -> None:
        self.bias = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5)) * 2

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.bias


class BansWhatARowSaid(LogitsProcessor):
    """Bans one more token in each step, with a state per row."""

    def __init__(self) -> None:
        self.banned: dict[int, list[int]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, best in enumerate(scores.argmax(-1).tolist()):
            scores[row, self.banned.setdefault(row, [])] = -torch.inf
            self.banned[row].append((best + row) % 64)
        return scores


class BansTokensOfOtherRows(LogitsProcessor):
    """Bans the newest tokens of all rows in every row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -1]
        for row in range(len(scores)):
            scores[row, torch.cat([last[:row], last[row + 1 :]])] = -torch.inf
        return scores


class CountsSteps(LogitsProcessor):
    """Bans the token whose id is the number of calls so far."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores[:, (7 * self.calls) % 64] += 30.0 * (self.calls % 3 == 0)
        return scores


class AnyRowSays(StoppingCriteria):
    """Stops all rows once one of them has emitted one of the tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        said = torch.isin(input_ids[:, L:], torch.tensor(self.tokens)).any()
        return torch.full((len(input_ids),), bool(said))


class StopsByPlace(StoppingCriteria):
    """Stops row i after 3 + 4 i tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] - L >= 3 + 4 * row for row in range(len(input_ids))])


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "bias per row": lambda rows: {"logits_processor": [BiasPerRow(rows)]},
    "ban per row": lambda rows: {"logits_processor": [BansWhatARowSaid()]},
    "ban across rows": lambda rows: {"logits_processor": [BansTokensOfOtherRows()]},
    "counter": lambda rows: {"logits_processor": [CountsSteps()], "repetition_penalty": 1.2},
    "plain function": lambda rows: {"logits_processor": [lambda ids, scores: scores.roll(len(ids) - 1, 1)]},
    "stop together": lambda rows: {"stopping_criteria": [AnyRowSays([9, 33, 41])]},
    "stop by place": lambda rows: {"stopping_criteria": [StopsByPlace()]},
    "both": lambda rows: {"logits_processor": [BiasPerRow(rows)], "stopping_criteria": [StopsByPlace()]},
}


def options(part: str, rows: int, **more: Any) -> dict[str, Any]:
    """New processors and criteria, because they have state."""
    made = PARTS[part](rows)
    if "logits_processor" in made:
        made["logits_processor"] = LogitsProcessorList(made["logits_processor"])
    if "stopping_criteria" in made:
        made["stopping_criteria"] = StoppingCriteriaList(made["stopping_criteria"])
    return {**made, "max_new_tokens": NEW, **more}


def library(inputs: dict[str, Tensor], seed: int, **kwargs: Any) -> list[list[int]]:
    """The answers of `generate()`, each up to its EOS token."""
    torch.manual_seed(seed)
    rows = model().generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in rows]


def ours(method: Any, inputs: dict[str, Tensor], start: int, **kwargs: Any) -> list[Result]:
    torch.manual_seed(start)
    results = SpeculativeVLM(model(), None, ALWAYS, method).generate(**inputs, **kwargs)
    assert isinstance(results, list)
    return results


def same(result: Result, wanted: list[int]) -> None:
    """A row that a criterion stopped is padded by `generate()` until the last row ends."""
    assert result.tokens == wanted[: len(result.tokens)]
    assert set(wanted[len(result.tokens) :]) <= {tiny.PAD}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_custom_parts_get_the_same_batch_as_from_generate(part: str, do_sample: bool) -> None:
    accepted = 0
    for seed in range(2):
        wanted = library(BATCH, seed, **options(part, 3, do_sample=do_sample))
        for method in ("ar", "prompt-lookup", RandomDrafter(seed, 64, wanted)):
            results = ours(method, BATCH, seed, **options(part, 3, do_sample=do_sample))
            for result, row in zip(results, wanted, strict=True):
                same(result, row)
            accepted += results[0].statistics.num_accepted_draft_tokens
    assert accepted > 0, "no draft was accepted, so nothing was tested"


@pytest.mark.parametrize("part", ["bias per row", "ban per row", "ban across rows", "stop by place"])
def test_num_return_sequences_is_a_batch(part: str) -> None:
    inputs, more = ROWS[0], {"do_sample": True, "num_return_sequences": 3}
    wanted = library(inputs, 4, **options(part, 3, **more))
    results = ours(RandomDrafter(1, 64, wanted), inputs, 4, **options(part, 3, **more))
    assert len(results) == 3
    for result, row in zip(results, wanted, strict=True):
        same(result, row)


def test_rows_without_an_eos_token_end_at_a_criterion() -> None:
    """`generate()` pads no row where no end-of-sequence token is known; what stopped is cut where it stopped."""
    made = {"logits_processor": LogitsProcessorList([BansTokensOfOtherRows()]), "max_new_tokens": NEW}
    criteria = StoppingCriteriaList([StopsByPlace()])
    endless = tiny.llava(sharpness=10.0)
    endless.generation_config.eos_token_id = None
    wanted = endless.generate(**BATCH, **made, stopping_criteria=criteria)[:, L:].tolist()
    results = SpeculativeVLM(endless, None, drafter=RandomDrafter(0, 64, wanted)).generate(
        **BATCH, **made, stopping_criteria=criteria
    )
    assert isinstance(results, list)
    assert [len(r.tokens) for r in results] == [3, 7, 11]
    assert [r.tokens for r in results] == [row[: len(r.tokens)] for row, r in zip(wanted, results, strict=True)]


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.2, "top_k": 0}])
@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_with_one_generator_is_drawn_as_generate_draws_it(shared: bool, setting: dict[str, Any]) -> None:
    """Rows accept different numbers of drafts and end at different tokens; draw k still belongs to token k."""
    inputs, accepted, ends = tiny.batch(ROWS[0], ROWS[0], ROWS[0], ROWS[0]), set(), set()
    for seed in range(4):
        kwargs = {"do_sample": True, "max_new_tokens": 24, **setting}
        wanted = library(inputs, seed, **kwargs)
        state = torch.get_rng_state()
        for method in ("ar", "prompt-lookup", RandomDrafter(seed, 64, wanted)):
            generator = torch.Generator().manual_seed(seed) if shared else None
            results = ours(method, inputs, seed, seed=generator, **kwargs)
            assert [r.tokens for r in results] == wanted
            left = generator.get_state() if generator is not None else torch.get_rng_state()
            assert torch.equal(left, state), "the generator has the same state as after generate()"
            accepted |= {step.accepted for step in results[0].statistics.steps}
        ends |= {len(row) for row in wanted}
    assert len(accepted) > 2 and len(ends) > 2, "all rows advanced equally, so nothing was tested"


def test_invalid_probabilities_raise_in_a_batch_too() -> None:
    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores * torch.nan

    with pytest.raises(RuntimeError, match="inf"):
        ours("ar", BATCH, 0, do_sample=True, logits_processor=LogitsProcessorList([broken]), max_new_tokens=4)


class Recorder(StoppingCriteria):
    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("inputs", [ROWS[0], BATCH])
def test_criteria_run_after_every_token(inputs: dict[str, Tensor]) -> None:
    theirs, mine = Recorder(), Recorder()
    wanted = library(inputs, 0, stopping_criteria=StoppingCriteriaList([theirs]), max_new_tokens=NEW)
    engine = SpeculativeVLM(model(), None, drafter=RandomDrafter(0, 64, wanted))
    engine.generate(**inputs, stopping_criteria=StoppingCriteriaList([mine]), max_new_tokens=NEW)
    assert mine.lengths == theirs.lengths


def test_a_list_in_gives_a_list_out() -> None:
    one = SpeculativeVLM(model(), None, drafter="ar").generate(**ROWS[0], max_new_tokens=2)
    assert isinstance(one, Result)
    several = SpeculativeVLM(model(), None, drafter="ar").generate(
        **ROWS[0], max_new_tokens=2, do_sample=True, num_return_sequences=3
    )
    assert isinstance(several, list) and len(several) == 3


class KeepsWhatItSees(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        return scores


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_is_that_of_generate(rows: int) -> None:
    one = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    inputs = one if rows == 1 else BATCH
    theirs, mine = KeepsWhatItSees(), KeepsWhatItSees()
    wanted = library(inputs, 0, logits_processor=LogitsProcessorList([theirs]), max_new_tokens=NEW)
    engine = SpeculativeVLM(model(), None, drafter=RandomDrafter(0, 64, wanted))
    engine.generate(**inputs, logits_processor=LogitsProcessorList([mine]), max_new_tokens=NEW)
    assert mine.seen == theirs.seen


SEES_PADDING: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 0.1},
]


def padded_with(inputs: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, token)}


@pytest.mark.parametrize("setting", SEES_PADDING)
@pytest.mark.parametrize("do_sample", [False, True])
def test_penalties_read_padding_as_in_generate(setting: dict[str, Any], do_sample: bool) -> None:
    """Without a seed per row, repetition penalties also count padding tokens, as in `generate()`."""
    kwargs, mattered = {"do_sample": do_sample, "max_new_tokens": 24, **setting}, False
    for seed in range(2):
        plain = library(BATCH, seed, **kwargs)
        for token in plain[2][:2]:  # of the row with most padding
            inputs = padded_with(BATCH, token)
            wanted = library(inputs, seed, **kwargs)
            results = ours(RandomDrafter(seed, 64, wanted), inputs, seed, **kwargs)
            assert [r.tokens for r in results] == wanted
            mattered |= wanted != plain
    assert mattered, "padding changed no answer, so nothing was tested"


def test_a_single_padded_row_keeps_its_padding() -> None:
    kwargs = {"encoder_no_repeat_ngram_size": 1, "max_new_tokens": NEW}
    row = {k: torch.nn.functional.pad(v, (5, 0)) if v.dim() == 2 else v for k, v in ROWS[0].items()}
    plain = library(row, 0, **kwargs)
    row = padded_with(row, plain[0][0])
    wanted = library(row, 0, **kwargs)
    assert wanted != plain, "the padding matters"
    for seed in (None, 3):
        engine = SpeculativeVLM(model(), None, drafter=RandomDrafter(0, 64, wanted))
        assert [engine.generate(**row, **kwargs, seed=seed).tokens] == wanted


@pytest.mark.parametrize("inputs", [ROWS[0], BATCH])
def test_scores_without_a_row_for_each_answer_are_refused(inputs: dict[str, Tensor]) -> None:
    def first(ids: Tensor, scores: Tensor) -> Tensor:
        return scores[0]

    with pytest.raises(UserError, match=r"\[64\]"):
        SpeculativeVLM(model(), None, drafter="ar").generate(**inputs, logits_processor=[first], max_new_tokens=2)


def test_parts_that_write_to_the_ids_are_refused() -> None:
    """`generate()` would continue from the modified ids; drafts may have been accepted after the original ones."""

    def wrote(ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if ids.shape[1] == inputs["input_ids"].shape[1] + 2:
            ids[:, -1] = 7
        return torch.zeros(len(ids), dtype=torch.bool) if scores is None else scores

    for inputs in (BATCH, ROWS[0]):
        for parts in ({"logits_processor": LogitsProcessorList([wrote])}, {"stopping_criteria": [wrote]}):
            with pytest.raises(UserError, match="input_ids"):
                SpeculativeVLM(model(), None, drafter="prompt-lookup").generate(**inputs, **parts, max_new_tokens=NEW)
