"""Sampler: the law a request samples from, its randomness, and where it stops; all as in `transformers` `generate()`.

Given raw target logits at a node and the tokens on the node's path, `law` gives the processed scores, `draw` a token,
and `emit` appends it and decides whether the row goes on. Processors and stopping criteria are the very objects that
`generate()` built. This module knows nothing of trees or of how the logits were computed.

In a batch the rows usually go on independently. A logits processor or stopping criterion of the user's may look at all
rows of a step at once, or keep state for each of them; with one of those the rows go on in lockstep (`Sampler`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

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

from msd.core.layout import Layout
from msd.errors import UserError

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

    randomness: a list with one generator per row (each row draws as if alone, and processors see none of its padding);
    one generator for the whole batch, or None for torch's global one (a row's k-th token then takes the row's part of
    the k-th draw, and processors see the padding, as in `generate()`).
    vocabulary: V. prompt: [B, L] the prompts as processors see them; the layout's by default. padding: the token that
    finished rows emit in lockstep, or None where they go on emitting what the target predicts, as in `generate()`.
    `finish` holds, per row, why it stopped ("eos", "length", "criteria") or None while it goes on.

    lockstep: whether a processor or criterion may look across rows. All rows then emit equally many tokens in a step,
    finished rows stay in the batch until the last one finishes, and processors and criteria see exactly the tensors
    [B, L + t] and [B, V] that `generate()` would show them.
    """

    def __init__(
        self,
        layout: Layout,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        do_sample: bool,
        vocabulary: int,
        randomness: Randomness = None,
        prompt: Tensor | None = None,
        padding: int | None = None,
    ) -> None:
        self.layout, self.processors, self.do_sample, self.randomness = layout, processors, do_sample, randomness
        self.vocabulary, self.padding = vocabulary, padding
        B = layout.batch
        self.prompt = layout.tokens[:, : layout.end[0]].clone() if prompt is None else prompt
        self.lockstep = any(_looks_across_rows(part) for part in (*processors, *criteria))
        self.alone = B > 1 and not self.lockstep and isinstance(randomness, list)
        apart = B > 1 and not self.lockstep
        self.per_row = [self._for_row(r) for r in range(B)] if apart else [processors]
        self.pointwise = all(type(p) in _POINTWISE for p in processors)
        drawn_together = do_sample and B > 1
        self.noise = SharedNoise(B, randomness) if drawn_together and not isinstance(randomness, list) else None
        self.max_length = min([c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)] + [layout.capacity])
        self.eos = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id}
        native = (MaxLengthCriteria, EosTokenCriteria)
        self.criteria = StoppingCriteriaList([c for c in criteria if not isinstance(c, native)])
        self.finish: list[str | None] = [None] * B

    @property
    def alive(self) -> list[int]:
        """Rows that take part in the next step: the unfinished ones; in lockstep all, until the last one finishes."""
        unfinished = [row for row, why in enumerate(self.finish) if why is None]
        return list(range(self.layout.batch)) if self.lockstep and unfinished else unfinished

    @property
    def finished(self) -> frozenset[int]:
        """Rows that have stopped."""
        return frozenset(row for row, why in enumerate(self.finish) if why is not None)

    def room(self, row: int) -> int:
        """How many tokens `row` may still emit."""
        return self.max_length - self.layout.end[row]

    def logits(self, raw: Tensor, rows: list[int]) -> Tensor:
        """Processed logits [R, V] float32 of `raw` ones [R, V]; each row's history is what it has emitted so far."""
        scores = raw.to(copy=True, dtype=torch.float32)
        if not self.processors:
            return scores
        if self.lockstep:
            every = torch.zeros(self.layout.batch, scores.shape[1], device=scores.device)
            every[rows] = scores
            shown = self._shown()
            scores = self.processors(shown, every)
            self._check_untouched(shown)
            if scores.dim() != 2 or len(scores) != len(every):
                raise UserError(f"the logits processors returned {list(scores.shape)} scores for {list(every.shape)}")
            return scores[rows]
        if self.pointwise:
            return self.processors(self.layout.tokens[rows, :1], scores)
        return torch.cat([self.per_row[r](self._history(r)[None], scores[i, None]) for i, r in enumerate(rows)])

    def probabilities(self, law: Tensor) -> Tensor:
        """p [R, V]: the softmax of processed scores; at temperature 0 all mass is on the argmax."""
        if self.do_sample:
            return law.softmax(-1)
        return torch.zeros_like(law).scatter_(1, law.argmax(-1, keepdim=True), 1.0)

    def draw(self, law: Tensor, rows: list[int]) -> Tensor:
        """The next token of each row, [R]: the argmax, or one multinomial draw exactly as `generate()` makes it.

        To be asked once for every token that a row emits.
        """
        if not self.do_sample:
            return law.argmax(-1)
        p = law.softmax(-1)
        return self.multinomial(p, rows) if self.noise is None else self.noise.draw(p, rows, self.alive)

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

    def padded(self, rows: list[int], token: Tensor, child: Tensor) -> tuple[Tensor, Tensor]:
        """(token [R], child [R]) with padding in the place of what finished rows drew, below which nothing is drafted.

        Only in lockstep do finished rows take part at all.
        """
        over = [i for i, row in enumerate(rows) if self.finish[row] is not None]
        if not over or self.padding is None:
            return token, child
        token, child = token.clone(), child.clone()
        token[over], child[over] = self.padding, -1
        return token, child

    def emit(self, row: int, token: int) -> bool:
        """Appends `token` to `row`; True when the row takes part in the next step."""
        self.layout.append(row, [token])
        stops = bool(self.criteria) and bool(self.criteria(self._history(row)[None], None)[0])
        return self._goes_on(row, token, stops)

    def emit_all(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Emits a token to each of `rows`; for each, whether it takes part in the next step."""
        if not self.lockstep:
            return [self.emit(row, token) for row, token in zip(rows, tokens, strict=True)]
        for row, token in zip(rows, tokens, strict=True):
            self.layout.append(row, [token])
        shown = self._shown()
        stops = self.criteria(shown, None).tolist() if self.criteria else [False] * self.layout.batch
        self._check_untouched(shown)
        for row, token in zip(rows, tokens, strict=True):
            self._goes_on(row, token, stops[row])
        alive = set(self.alive)
        return [row in alive for row in rows]

    def _goes_on(self, row: int, token: int, stops: bool) -> bool:
        """Whether `row` is unfinished after its newest `token`. stops: what the criteria say of it."""
        if self.finish[row] is None:
            if token in self.eos:
                self.finish[row] = "eos"
            elif self.room(row) <= 0:
                self.finish[row] = "length"
            elif stops:
                self.finish[row] = "criteria"
        return self.finish[row] is None

    def _for_row(self, row: int) -> LogitsProcessorList:
        """The processors of `row`; see `_for_row`."""
        start = self.layout.start[row] if self.alone else 0
        return _for_row(self.processors, row, self._history(row)[None, start:], start)

    def _history(self, row: int) -> Tensor:
        """What processors and criteria see of `row`: [end]. With the prompt's padding, but for rows that are alone."""
        history = self.layout.history(row)
        if self.alone or not self.layout.start[row]:
            return history
        return torch.cat([self.prompt[row], history[self.prompt.shape[1] :]])

    def _check_untouched(self, shown: Tensor) -> None:
        """UserError where what was `shown` is not any more what was emitted."""
        if not torch.equal(shown, self._shown()):
            raise UserError(
                "a logits processor or stopping criterion wrote to the input_ids that it was shown, which drafts may "
                "have been accepted after; have it change scores instead"
            )

    def _shown(self) -> Tensor:
        """The ids [B, L + t] that `generate()` would hold now: prompts with their padding, and what was emitted."""
        L = self.prompt.shape[1]
        return torch.cat([self.prompt, self.layout.tokens[:, L : max(self.layout.end)]], 1)


def temperature(sampler: Sampler) -> float | None:
    """The temperature of a request that samples, 1 where it names none; None for greedy decoding."""
    if not sampler.do_sample:
        return None
    warpers = [p for p in sampler.processors if isinstance(p, TemperatureLogitsWarper)]
    return float(warpers[-1].temperature) if warpers else 1.0


def _looks_across_rows(part: object) -> bool:
    """Whether a processor or criterion may treat a row by its place in the batch, or by the other rows.

    The library's own treat every row by itself, or are made to (`_for_row`); of anybody else's, nothing is known.
    """
    return not type(part).__module__.startswith("transformers.generation.")


def _for_row(processors: LogitsProcessorList, row: int, prompt: Tensor, start: int) -> LogitsProcessorList:
    """The processors of one row, those with a memory with its own: its prompt [1, L'] after `start` columns to skip."""
    alone = LogitsProcessorList(copy.copy(p) for p in processors)
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


class SharedNoise:
    """generator: of the whole batch of B rows; None: torch's global one.

    Memory: at most 8 V bytes for every unfinished row and every token that it is behind the furthest row.
    """

    def __init__(self, batch: int, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._used = [0] * batch  # draws made by each row
        self._kept: dict[int, _Noise] = {}  # by number of the draw

    def draw(self, p: Tensor, rows: list[int], waiting: list[int]) -> Tensor:
        """The next token of each of `rows` from p [R, V]: [R]. waiting: rows that draw now or later, these included.

        RuntimeError, as from `torch.multinomial`, where p is no distribution.
        """
        if not bool((p.amax() < torch.inf) & (p.amin() >= 0)):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        members: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(self._used[row], []).append(i)
            self._used[row] += 1
        noise = torch.empty_like(p)
        for k, some in sorted(members.items()):
            if k not in self._kept:
                q = p.new_empty(len(self._used), p.shape[1]).exponential_(1, generator=self.generator)
                self._kept[k] = _Noise(q, list(range(len(q))))
            noise[some] = self._kept[k].of([rows[i] for i in some])
        last = min(self._used[row] for row in waiting)
        for k in list(self._kept):
            if k < last:
                del self._kept[k]
            else:
                self._kept[k].keep([row for row in waiting if self._used[row] <= k])
        return (p / noise).argmax(-1)


class _Noise:
    """One q, of those rows that have yet to use it: noise [R, V] of `rows`."""

    def __init__(self, noise: Tensor, rows: list[int]) -> None:
        self.noise, self.rows = noise, rows

    def of(self, rows: list[int]) -> Tensor:
        """Their parts, in that order."""
        if rows == self.rows:
            return self.noise
        place = {row: i for i, row in enumerate(self.rows)}
        return self.noise[[place[row] for row in rows]]

    def keep(self, rows: list[int]) -> None:
        """Lets go of all others once they are half of what is held."""
        if 2 * len(rows) <= len(self.rows):
            self.noise, self.rows = self.of(rows).clone(), rows


Seed = int | Sequence[int] | torch.Generator | None
LEAST, MOST = -(1 << 63), (1 << 64) - 1  # what torch.manual_seed takes


def generators(seed: Any, batch: int, device: torch.device) -> list[torch.Generator] | torch.Generator | None:
    """Generators of a batch: of a seed s, row i gets s + i; of a list, tuple or array of seeds, row i gets number i.

    A seed is an integer of any type, as `torch.manual_seed` takes it. None and a generator are given back as they are.
    UserError for anything else.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    if hasattr(seed, "tolist"):  # of numpy or torch, with or without axes
        seed = seed.tolist()
    if not isinstance(seed, list | tuple | range):
        first = _checked(seed)
        seed = [_checked(first + row) for row in range(batch)]
    if len(seed) != batch:
        raise UserError(f"{len(seed)} seeds for {batch} answers; give one seed, or one per answer")
    return [torch.Generator(device).manual_seed(_checked(s)) for s in seed]


def _checked(seed: Any) -> int:
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise UserError(f"the seed {seed!r} is of type {type(seed).__name__}; give an integer, or one for each answer")
    number = int(seed)
    if not LEAST <= number <= MOST:
        raise UserError(f"the seed {number} does not fit 64 bits; give one from -2**63 to 2**64 - 1")
    return number
