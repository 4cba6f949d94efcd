"""Sampler: the law a request samples from, its randomness, and where it stops; all as in `transformers` `generate()`.

Given raw target logits at a node and the tokens on the node's path, `law` gives the processed scores, `draw` a token,
and `emit` appends it and decides whether the row goes on. Processors and stopping criteria are the very objects that
`generate()` built. This module knows nothing of trees or of how the logits were computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from msd.errors import UserError
from msd.layout import Layout

# processors whose result depends on the scores alone: they may run on all rows at once, whatever their histories
_POINTWISE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)

Randomness = torch.Generator | list[torch.Generator] | None


class Sampler:
    """Laws, draws and stops for the B rows of a layout.

    randomness: a list with one generator per row (each row draws as if alone); one generator for the whole batch (a
    single call draws for all rows that go on; `generate()` also draws for finished rows, so the two agree until the
    first row ends); or None for torch's global one. vocabulary: V.
    `finish` holds, per row, why it stopped ("eos", "length", "criteria") or None while it goes on.
    """

    def __init__(
        self,
        layout: Layout,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        do_sample: bool,
        vocabulary: int,
        randomness: Randomness = None,
    ) -> None:
        self.layout, self.processors, self.do_sample, self.randomness = layout, processors, do_sample, randomness
        self.vocabulary = vocabulary
        rows = range(layout.batch)
        self.per_row = [_for_row(processors, r, layout) for r in rows] if layout.batch > 1 else [processors]
        self.pointwise = all(type(p) in _POINTWISE for p in processors)
        self.max_length = min([c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)] + [layout.capacity])
        self.eos = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id}
        native = (MaxLengthCriteria, EosTokenCriteria)
        self.criteria = StoppingCriteriaList([c for c in criteria if not isinstance(c, native)])
        self.finish: list[str | None] = [None] * layout.batch

    @property
    def alive(self) -> list[int]:
        """Rows that go on."""
        return [row for row, why in enumerate(self.finish) if why is None]

    def room(self, row: int) -> int:
        """How many tokens `row` may still emit."""
        return self.max_length - self.layout.end[row]

    def law(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Processed scores [R, V] float32 of raw `logits` [R, V]; each row's history is what it has emitted so far."""
        scores = logits.to(copy=True, dtype=torch.float32)
        if not self.processors:
            return scores
        if self.pointwise:
            return self.processors(self.layout.tokens[rows, :1], scores)
        return torch.cat([self.per_row[r](self.layout.history(r)[None], scores[i, None]) for i, r in enumerate(rows)])

    def probabilities(self, law: Tensor) -> Tensor:
        """p [R, V]: the softmax of processed scores; at temperature 0 all mass is on the argmax."""
        if self.do_sample:
            return law.softmax(-1)
        return torch.zeros_like(law).scatter_(1, law.argmax(-1, keepdim=True), 1.0)

    def draw(self, law: Tensor, rows: list[int]) -> Tensor:
        """One token per row, [R]: the argmax, or one multinomial draw exactly as `generate()` makes it."""
        return self.multinomial(law.softmax(-1), rows) if self.do_sample else law.argmax(-1)

    def multinomial(self, p: Tensor, rows: list[int]) -> Tensor:
        """Draws from p [R, V] with the rows' randomness: [R]."""
        if isinstance(self.randomness, list):
            one = [torch.multinomial(p[i : i + 1], 1, generator=self.randomness[r]) for i, r in enumerate(rows)]
            return torch.cat(one).squeeze(1)
        return torch.multinomial(p, 1, generator=self.randomness).squeeze(1)

    def uniform(self, rows: list[int], device: torch.device) -> Tensor:
        """One uniform number in [0, 1) per row, [R] float64."""
        if isinstance(self.randomness, list):
            one = [torch.rand(1, generator=self.randomness[r], device=device, dtype=torch.float64) for r in rows]
            return torch.cat(one)
        return torch.rand(len(rows), generator=self.randomness, device=device, dtype=torch.float64)

    def emit(self, row: int, token: int) -> bool:
        """Appends `token` to `row`; True when the row goes on after it."""
        self.layout.append(row, [token])
        if token in self.eos:
            self.finish[row] = "eos"
        elif self.room(row) <= 0:
            self.finish[row] = "length"
        elif self.criteria and bool(self.criteria(self.layout.history(row)[None], None)[0]):
            self.finish[row] = "criteria"
        return self.finish[row] is None


def temperature(sampler: Sampler) -> float | None:
    """The temperature of a request that samples, 1 where it names none; None for greedy decoding."""
    if not sampler.do_sample:
        return None
    warpers = [p for p in sampler.processors if isinstance(p, TemperatureLogitsWarper)]
    return float(warpers[-1].temperature) if warpers else 1.0


def _for_row(processors: LogitsProcessorList, row: int, layout: Layout) -> LogitsProcessorList:
    """The processors as they would be had `row` come alone; those with a memory get one each."""
    alone = LogitsProcessorList(copy.copy(p) for p in processors)
    start = layout.start[row]
    prompt = layout.history(row)[None, start:]
    for i, mine in enumerate(alone):
        if isinstance(mine, RepetitionPenaltyLogitsProcessor):
            if isinstance(mine.prompt_ignore_length, Tensor):
                mine.prompt_ignore_length = mine.prompt_ignore_length[row : row + 1]
        elif isinstance(mine, EncoderRepetitionPenaltyLogitsProcessor):
            mine.encoder_input_ids = prompt
        elif isinstance(mine, EncoderNoRepeatNGramLogitsProcessor):
            alone[i] = _Unpadded(EncoderNoRepeatNGramLogitsProcessor(mine.ngram_size, prompt), start)
        elif isinstance(mine, NoRepeatNGramLogitsProcessor | SequenceBiasLogitsProcessor):
            alone[i] = _Unpadded(mine, start)
        elif isinstance(mine, PrefixConstrainedLogitsProcessor):
            mine._prefix_allowed_tokens_fn = partial(_as_row, mine._prefix_allowed_tokens_fn, row)
        elif isinstance(mine, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise UserError("guidance_scale with several prompts at once is not supported; give one prompt at a time")
    return alone


class _Unpadded(LogitsProcessor):
    """`processor` without the `start` columns of padding, whose repeated token would make n-grams of its own."""

    def __init__(self, processor: LogitsProcessor, start: int) -> None:
        self.processor, self.start = processor, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[1, V]."""
        return self.processor(input_ids[:, self.start :], scores)


def _as_row(allowed: Callable[[int, Tensor], list[int]], row: int, _: int, tokens: Tensor) -> list[int]:
    """`prefix_allowed_tokens_fn` called for the row it belongs to."""
    return allowed(row, tokens)
