"""Answer: one choice of a completion. It turns what the scheduler emits into pieces of text for the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from msd.decode import Engine
from msd.errors import UserError
from msd.inputs.prompts import Request
from msd.serve.batch import Emission
from msd.serve.media import Medium, Recorded
from msd.serve.metrics import Metrics
from msd.serve.scheduler import CANCELLED, LATE, Job
from msd.serve.schema import Completion
from msd.serve.text import AnswerText
from msd.serve.trace import Tracer

PLAIN = "ar"  # the method without drafts
FINISH = {"eos": "stop", "criteria": "stop", "length": "length", LATE: "length"}  # OpenAI's names


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, the log-probabilities of the tokens since the last piece, and the finish reason.

    step: what `msd.trace` adds, see `msd.serve.trace`.
    """

    text: str
    logprobs: list[dict[str, Any]]
    finish: str | None = None
    step: dict[str, Any] | None = None


@dataclass
class Counts:
    """The drafting of an answer, by modality: nodes drafted and accepted; tokens of a lossy policy and their Σ TV."""

    tokens: int = 0
    drafts: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    modality: Counter[str] = field(default_factory=Counter)
    lossy: Counter[str] = field(default_factory=Counter)
    divergence: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def read(self, emission: Emission) -> None:
        """Adds one step."""
        self.tokens += len(emission.tokens)
        self.steps += 1
        self.drafts += bool(emission.drafted)
        self.drafted.update(emission.drafted)
        self.accepted.update(emission.accepted)
        self.modality.update(emission.modality)
        for name, total_variation in zip(emission.modality, emission.divergence, strict=False):
            self.lossy[name] += 1
            self.divergence[name] += total_variation


class Answer:
    """The answer `number` of a completion. Its `job` runs in the scheduler's thread, `pieces` is read in the loop's.

    events: the argument of `generate()`, if the drafter reads a recording.
    """

    def __init__(
        self, processor: Any, body: Completion, media: list[Medium], number: int, metrics: Metrics, most: int,
        engine: Engine | None, events: dict[str, Any],
    ) -> None:  # fmt: skip
        self.number, self.counts, self._body, self._metrics = number, Counts(), body, metrics
        self._processor, self._media, self._loop = processor, media, asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._text = AnswerText(processor.tokenizer, body.stops)
        self._over = False
        seed = None if body.seed is None else body.seed + number
        options, drafts = _options(body, most) | events, body.msd.method != PLAIN
        self._tracer = Tracer(processor.tokenizer) if body.msd.trace else None
        self.job = Job(self._prepare, options, self._receive, seed, engine, drafts, body.msd.trace)

    def _prepare(self) -> dict[str, Any]:
        request = prompt_of(self._processor, self._body, self._media)
        return {**request.inputs(), "request": request}

    def _receive(self, outcome: Emission | Exception | None) -> None:
        """Takes an emission, in the scheduler's thread."""
        if self._over or outcome is None:
            return
        if isinstance(outcome, Exception):
            self._end(outcome, "error")
            return
        self.counts.read(outcome)
        self._metrics.read(self.job, outcome)
        text = self._text.read(outcome.tokens, last=outcome.finish is not None)
        finish = "stop" if self._text.stopped else FINISH.get(outcome.finish or "")
        if outcome.finish == LATE and not self.counts.tokens:
            self._end(TimeoutError(), LATE)
        elif outcome.finish == CANCELLED:
            self._end(None, CANCELLED)
        elif finish or text or outcome.logits or self._tracer:
            step = None if self._tracer is None else self._tracer.read(outcome)
            piece = Piece(text, self._logprobs(outcome), finish, step)
            if finish:
                self.job.cancel()  # an answer that has met a stop string leaves the batch
                self._end(piece, finish)
            else:
                self._put(piece)

    def _end(self, last: Piece | Exception | None, reason: str) -> None:
        """Hands out the last piece and counts the answer."""
        self._over = True
        self._metrics.finish(self.job, self.counts.tokens, reason, time.monotonic())
        if last is not None:
            self._put(last)

    def _put(self, piece: Piece | Exception) -> None:
        self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def _logprobs(self, emission: Emission) -> list[dict[str, Any]]:
        """OpenAI's entries for each token, from the target's unprocessed logits."""
        if not self._body.logprobs:
            return []
        decode, entries = self._processor.tokenizer.decode, []

        def entry(token: int, value: Tensor) -> dict[str, Any]:
            text = decode([token])
            return {"token": text, "logprob": max(float(value), -9999.0), "bytes": list(text.encode())}

        for token, (raw, _) in zip(emission.tokens, emission.logits, strict=True):
            values = raw.float().log_softmax(-1)
            top = values.topk(self._body.top_logprobs)
            best = [entry(int(t), v) for t, v in zip(top.indices, top.values, strict=True)]
            entries.append({**entry(token, values[token]), "top_logprobs": best})
        return entries


def prompt_of(processor: Any, body: Completion, media: list[Medium]) -> Request:
    """Writes the prompt. UserError for text with special tokens, which could imitate turns or images."""
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    for text in body.texts():
        if found := next((token for token in tokenizer.all_special_tokens if token in text), None):
            raise UserError(f"the text contains '{found}', which this model reserves; leave it out")
    seen = [medium for medium in media if body.drawn or not isinstance(medium, Recorded)]
    return Request.of(processor, [seen], None, [body.chat()])


def _options(body: Completion, most: int) -> dict[str, Any]:
    """The options of `generate()`. most: tokens of an answer whose request does not say."""
    options: dict[str, Any] = {"max_new_tokens": body.max_completion_tokens or body.max_tokens or most}
    if body.temperature == 0:
        options["do_sample"] = False
    else:
        options |= {"do_sample": True, "temperature": body.temperature, "top_p": body.top_p, "top_k": 0}
    if body.logprobs:
        options |= {"return_dict_in_generate": True, "output_logits": True}
    return options
