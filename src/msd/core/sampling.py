"""Sampler: turns target logits into tokens and stops rows, exactly as `transformers` `generate()` does.

From the raw target logits at a node and the tokens before it, `logits` computes the processed logits and `draw` a
token; `emit` appends the token and decides whether the row has finished. The logits processors and stopping criteria
are the objects that `generate()` built.

Normally each row of a batch advances independently. A custom logits processor or stopping criterion may compare rows,
or keep state for each of them; with one of those, all rows advance in lockstep (see `Sampler`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from msd.core.foresight import Foresight, Outlook
from msd.core.layout import Layout
from msd.errors import UserError

# processors that ignore the token history: they run on all rows at once
_POINTWISE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)

Randomness = torch.Generator | list[torch.Generator] | None


class Sampler:
    """Processed logits, draws and stopping for the B rows of a layout.

    randomness: a list with one generator per row (each row draws as if it were alone, and processors do not see its
    padding); or one generator for the whole batch, or None for torch's global one (then, as in `generate()`, draw k
    covers the whole batch, and processors see the padding).
    vocabulary: V. prompt: [B, L], the prompts that processors see; by default those of the layout.
    padding: the token that finished rows emit in lockstep; None: they emit what the target predicts, as in
    `generate()`.
    keep_logits: whether the verifier stores the logits before each emitted token in `Accepted.logits`.

    Attributes: `finish` is, for each row, why it stopped ("eos", "length" or "criteria"), or None.
    `drafts` is whether rows may be drafted for; the caller may clear it. `foresees` is whether drafts may depend on the
    noise of the coming draws: only where they cannot change the output.
    `lockstep` is whether a processor or criterion may compare rows. Then all rows emit the same number of tokens in a
    step, finished rows stay in the batch until the last one finishes, and processors and criteria get the same tensors
    [B, L + t] and [B, V] as from `generate()`.
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
        keep_logits: bool = False,
    ) -> None:
        self.layout, self.processors, self.do_sample, self.randomness = layout, processors, do_sample, randomness
        self.vocabulary, self.padding, self.keep_logits = vocabulary, padding, keep_logits
        B = layout.batch
        self.prompt = layout.tokens[:, : layout.end[0]].clone() if prompt is None else prompt
        self.lockstep = any(_may_compare_rows(part) for part in (*processors, *criteria))
        independent = B > 1 and not self.lockstep
        self.hides_padding = independent and isinstance(randomness, list)
        starts = layout.start if self.hides_padding else [0] * B
        self.row_processors = [processors]
        if independent:
            self.row_processors = [_copy_processors(processors, r, self._history(r), starts[r]) for r in range(B)]
        self.pointwise = all(type(p) in _POINTWISE for p in processors)
        self.noise = None
        if do_sample and B > 1 and not isinstance(randomness, list):
            self.noise = SharedNoise(B, randomness)
        self.max_length = min([c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)] + [layout.capacity])
        self.eos = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id}
        native = (MaxLengthCriteria, EosTokenCriteria)
        self.criteria = StoppingCriteriaList([c for c in criteria if not isinstance(c, native)])
        self.finish: list[str | None] = [None] * B
        self.drafts, self.foresees = True, False
        self._foresights: dict[int, Foresight] = {}  # by row

    @property
    def alive(self) -> list[int]:
        """Rows of the next step: the unfinished ones; in lockstep all rows, until the last one finishes."""
        unfinished = [row for row, reason in enumerate(self.finish) if reason is None]
        return list(range(self.layout.batch)) if self.lockstep and unfinished else unfinished

    @property
    def finished(self) -> frozenset[int]:
        """Rows that have stopped."""
        return frozenset(row for row, reason in enumerate(self.finish) if reason is not None)

    def tokens_left(self, row: int) -> int:
        """The number of tokens that `row` may still emit."""
        return self.max_length - self.layout.end[row]

    def may_draft(self, row: int) -> bool:
        """Whether `row` may be drafted for."""
        return self.drafts

    def logits(self, raw: Tensor, rows: list[int]) -> Tensor:
        """Processed logits, [R, V] float32, from `raw` ones [R, V]; processors see the tokens of each row so far."""
        scores = raw.to(copy=True, dtype=torch.float32)
        if not self.processors:
            return scores
        if self.lockstep:
            batch = torch.zeros(self.layout.batch, scores.shape[1], device=scores.device)
            batch[rows] = scores
            input_ids = self._input_ids()
            scores = self.processors(input_ids, batch)
            self._check_unchanged(input_ids)
            if scores.dim() != 2 or len(scores) != len(batch):
                raise UserError(f"the logits processors returned {list(scores.shape)} scores for {list(batch.shape)}")
            return scores[rows]
        if self.pointwise:
            return self.processors(self.layout.tokens[rows, :1], scores)
        return torch.cat([self.row_processors[r](self._history(r)[None], scores[i, None]) for i, r in enumerate(rows)])

    def draw(self, logits: Tensor, rows: list[int]) -> Tensor:
        """The next token of each row, [R]: the argmax, or a multinomial draw as in `generate()`.

        Call it exactly once for each token that a row emits.
        """
        if not self.do_sample:
            return argmax(logits)
        p = logits.softmax(-1)
        return self.multinomial(p, rows) if self.noise is None else self.noise.draw(p, rows, self.alive)

    def multinomial(self, p: Tensor, rows: list[int]) -> Tensor:
        """One token per row drawn from p [R, V]: [R]."""
        if self._foresights or isinstance(self.randomness, list):
            return torch.cat([self._draw_one(p[i : i + 1], row) for i, row in enumerate(rows)])
        return torch.multinomial(p, 1, generator=self.randomness).squeeze(1)

    def _draw_one(self, p: Tensor, row: int) -> Tensor:
        """What `torch.multinomial` draws for one row from p [1, V], with the noise that drafts have used: [1]."""
        noise = self._foresights[row].take() if row in self._foresights else None
        if noise is not None:
            return drawn(p, noise)
        return torch.multinomial(p, 1, generator=self._generator(row)).squeeze(1)

    def _generator(self, row: int) -> torch.Generator | None:
        """The generator of a row's draws; None: torch's global one."""
        return self.randomness[row] if isinstance(self.randomness, list) else self.randomness

    def outlook(self, rows: list[int], levels: int) -> Outlook | None:
        """What is known of the next `levels` draws of `rows`; None for greedy decoding.

        The noise of a batch that shares a generator, and of torch's global one on an accelerator, is unknown.
        """
        if not self.do_sample:
            return None
        noise = [self._foresight(row) for row in rows] if self.foresees else [None]
        known = [foresight.noise(levels) for foresight in noise if foresight is not None]
        return Outlook(self._warp, torch.stack(known) if len(known) == len(rows) else None)

    def _foresight(self, row: int) -> Foresight | None:
        """The foresight of a row, if its draws have a generator of their own."""
        generator = self._generator(row)
        if self.noise is not None or (generator is None and self.layout.tokens.device.type != "cpu"):
            return None
        if row not in self._foresights:
            self._foresights[row] = Foresight(generator or torch.default_generator, self.vocabulary)
        return self._foresights[row]

    def _warp(self, drafted: Tensor) -> Tensor:
        """Draft logits [R, F, Vd] after the processors that need no tokens; else only at the temperature."""
        if not self.processors:
            return drafted
        if self.pointwise:
            return self.processors(self.layout.tokens[:1, :1], drafted.flatten(0, 1)).view_as(drafted)
        return drafted / self._temperature()

    def _temperature(self) -> float:
        """1 without a processor for it."""
        warpers = [p for p in self.processors if isinstance(p, logits_process.TemperatureLogitsWarper)]
        return float(warpers[-1].temperature) if warpers else 1.0

    def uniform(self, rows: list[int], device: torch.device) -> Tensor:
        """One uniform random number in [0, 1) per row: [R] float64."""
        if isinstance(self.randomness, list):
            one = [torch.rand(1, generator=self.randomness[r], device=device, dtype=torch.float64) for r in rows]
            return torch.cat(one)
        return torch.rand(len(rows), generator=self.randomness, device=device, dtype=torch.float64)

    def pad_finished(self, rows: list[int], token: Tensor, child: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces, in (token [R], child [R]), the token of each finished row by padding and its child by -1."""
        over = [i for i, row in enumerate(rows) if self.finish[row] is not None]
        if not over or self.padding is None:
            return token, child
        token, child = token.clone(), child.clone()
        token[over], child[over] = self.padding, -1
        return token, child

    def emit(self, row: int, token: int) -> bool:
        """Appends `token` to `row`; returns whether the row is still unfinished."""
        self.layout.append(row, [token])
        stop = bool(self.criteria) and bool(self.criteria(self._history(row)[None], None)[0])
        return self._update_finish(row, token, stop)

    @property
    def reads_logits_only(self) -> bool:
        """Whether each token is the argmax of a node's logits as they are, whatever came before it."""
        return not (self.do_sample or self.processors or self.lockstep or self.keep_logits)

    def emit_path(self, row: int, tokens: list[int]) -> int:
        """Emits `tokens` to `row`, in order, until it is finished; returns how many."""
        if self.criteria:
            return next((n for n, token in enumerate(tokens, 1) if not self.emit(row, token)), len(tokens))
        tokens = tokens[: self.tokens_left(row)]
        count = next((n for n, token in enumerate(tokens, 1) if token in self.eos), len(tokens))
        self.layout.append(row, tokens[:count])
        self._update_finish(row, tokens[count - 1], False)
        return count

    def emit_all(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Appends a token to each of `rows`; returns for each whether it takes part in the next step."""
        if not self.lockstep:
            return [self.emit(row, token) for row, token in zip(rows, tokens, strict=True)]
        for row, token in zip(rows, tokens, strict=True):
            self.layout.append(row, [token])
        input_ids = self._input_ids()
        stop = self.criteria(input_ids, None).tolist() if self.criteria else [False] * self.layout.batch
        self._check_unchanged(input_ids)
        for row, token in zip(rows, tokens, strict=True):
            self._update_finish(row, token, stop[row])
        alive = set(self.alive)
        return [row in alive for row in rows]

    def _update_finish(self, row: int, token: int, stop: bool) -> bool:
        """Sets `finish[row]` after its newest `token`; returns whether it is unfinished. stop: from the criteria."""
        if self.finish[row] is None:
            if token in self.eos:
                self.finish[row] = "eos"
            elif self.tokens_left(row) <= 0:
                self.finish[row] = "length"
            elif stop:
                self.finish[row] = "criteria"
        return self.finish[row] is None

    def _history(self, row: int) -> Tensor:
        """The tokens of `row` that processors and criteria see, [end]; the padding is the prompt's own."""
        history = self.layout.history(row)
        if self.hides_padding or not self.layout.start[row]:
            return history
        return torch.cat([self.prompt[row], history[self.prompt.shape[1] :]])

    def _check_unchanged(self, input_ids: Tensor) -> None:
        """Raises UserError if a processor or criterion has modified the `input_ids` that it was given."""
        if not torch.equal(input_ids, self._input_ids()):
            raise UserError(
                "a logits processor or stopping criterion wrote to the input_ids that it was shown, which drafts may "
                "have been accepted after; have it change scores instead"
            )

    def _input_ids(self) -> Tensor:
        """The ids [B, L + t] that `generate()` would have now: the prompts with their padding, then all new tokens."""
        L = self.prompt.shape[1]
        return torch.cat([self.prompt, self.layout.tokens[:, L : max(self.layout.end)]], 1)


def _may_compare_rows(part: object) -> bool:
    """Whether a processor or criterion may depend on a row's index or on other rows: all but the library's own.

    The library's own treat each row independently, or are made to by `_copy_processors`.
    """
    return not type(part).__module__.startswith("transformers.generation.")


def _copy_processors(processors: LogitsProcessorList, row: int, prompt: Tensor, start: int) -> LogitsProcessorList:
    """Copies of the processors for one row, with its own prompt [L].

    start: the number of padding columns that the processors of prompts, n-grams and sequence biases skip.
    """
    prompt = prompt[None, start:]
    copies = LogitsProcessorList(copy.copy(p) for p in processors)
    for i, mine in enumerate(copies):
        if isinstance(mine, logits_process.RepetitionPenaltyLogitsProcessor):
            if isinstance(mine.prompt_ignore_length, Tensor):
                mine.prompt_ignore_length = mine.prompt_ignore_length[row : row + 1]
        elif isinstance(mine, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
            mine.encoder_input_ids = prompt
        elif isinstance(mine, logits_process.EncoderNoRepeatNGramLogitsProcessor):
            copies[i] = _Unpadded(logits_process.EncoderNoRepeatNGramLogitsProcessor(mine.ngram_size, prompt), start)
        elif isinstance(mine, logits_process.NoRepeatNGramLogitsProcessor | logits_process.SequenceBiasLogitsProcessor):
            copies[i] = _Unpadded(mine, start)
        elif isinstance(mine, logits_process.PrefixConstrainedLogitsProcessor):
            allowed = mine._prefix_allowed_tokens_fn
            mine._prefix_allowed_tokens_fn = lambda _, tokens, allowed=allowed: allowed(row, tokens)
        elif isinstance(mine, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise UserError("guidance_scale with several prompts at once is not supported; give one prompt at a time")
    return copies


class _Unpadded(LogitsProcessor):
    """Runs `processor` without the `start` padding columns, whose repeated token would count as n-grams."""

    def __init__(self, processor: LogitsProcessor, start: int) -> None:
        self.processor, self.start = processor, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Processed scores, [1, V]."""
        return self.processor(input_ids[:, self.start :], scores)


class SharedNoise:
    """Draws tokens of a batch that shares one generator, when rows are at different lengths.

    `torch.multinomial` divides p [B, V] by exponential noise [B, V] and takes the argmax. Here the noise of draw k is
    generated once for all rows, and each row keeps its part until it emits its k-th token, so that every row gets the
    same token as in `generate()`.

    generator: of the whole batch of B rows; None: torch's global one. Memory: 4 V bytes per unfinished row and per
    token that the row is behind the longest one.
    """

    def __init__(self, batch: int, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._count = [0] * batch  # draws of each row so far
        self._generated = 0  # draws whose noise has been generated
        self._noise: dict[tuple[int, int], Tensor] = {}  # (draw number, row) -> unused noise [V]

    def draw(self, p: Tensor, rows: list[int], waiting: list[int]) -> Tensor:
        """The next token of each of `rows` from p [R, V]: [R]. waiting: rows that draw now or later.

        Raises RuntimeError, as `torch.multinomial` does, if p is not a distribution.
        """
        if any(self._count[row] == self._generated for row in rows):
            noise = p.new_empty(len(self._count), p.shape[1]).exponential_(1, generator=self.generator)
            self._noise |= {(self._generated, row): noise[row].clone() for row in waiting}
            self._generated += 1
        own = torch.stack([self._noise.pop((self._count[row], row)) for row in rows])
        for row in rows:
            self._count[row] += 1
        unfinished = set(waiting)
        self._noise = {key: noise for key, noise in self._noise.items() if key[1] in unfinished}
        return drawn(p, own)


def argmax(logits: Tensor) -> Tensor:
    """The first largest entry of each row [..., V]: [...]. numpy is seven times as fast for float32 on a CPU."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def drawn(p: Tensor, noise: Tensor) -> Tensor:
    """What `torch.multinomial` draws from p [R, V] with exponential noise ([V] or [R, V]): [R].

    Raises RuntimeError, as it does, if p is not a distribution.
    """
    if not bool((p.amax() < torch.inf) & (p.amin() >= 0)):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    return argmax(p / noise)


Seed = int | Sequence[int] | torch.Generator | None


def generators(seed: Any, batch: int, device: torch.device) -> list[torch.Generator] | torch.Generator | None:
    """The random generators of a batch.

    seed: an integer of any type (row i uses seed + i), or a list, tuple or array with one seed per row. None and a
    generator are returned unchanged. Raises UserError for anything else.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    if hasattr(seed, "tolist"):  # a numpy or torch scalar or array
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
    if not -(1 << 63) <= number < 1 << 64:  # the range of torch.manual_seed
        raise UserError(f"the seed {number} does not fit 64 bits; give one from -2**63 to 2**64 - 1")
    return number
