"""One timed answer, or a batch of them: by the library as users call it, and by us."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from msd.bench.assistant import shallow
from msd.core.statistics import RowStep, Statistics
from msd.model import SpeculativeVLM


@dataclass(frozen=True)
class Run:
    """Answers of one call and its times, in seconds. warm: of the same again, its photos being encoded already."""

    answers: list[list[int]]
    seconds: float
    prefill: float | None
    statistics: Statistics
    warm: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))

    def by_row(self) -> Iterable[tuple[list[RowStep], list[int]]]:
        """(steps, tokens) of every answer."""
        for row, answer in enumerate(self.answers):
            yield [step for step in self.statistics.steps if step.row == row], answer


class _FirstToken(BaseStreamer):
    """Notes when the first generated token comes."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        """The prompt comes first, then one call per token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


# ways of the library's own to decode: name -> what is added to `generate()` of a model
LIBRARY: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "transformers": lambda _: {},
    "transformers:prompt-lookup": lambda _: {"prompt_lookup_num_tokens": 10},
    "transformers:assisted": lambda model: {"assistant_model": shallow(model)},
}
TRANSFORMERS, PLAIN = "transformers", "ar"  # the library's plain decoding, and ours
DRAFTING = ("prompt_lookup_num_tokens", "assistant_model")


def library(model: PreTrainedModel, inputs: dict[str, Any], settings: dict[str, Any], seed: int) -> Run:
    """`transformers` `generate()`. Of a batch the time to the first token is not known: it takes no streamer.

    Nor does it when it drafts, and then its passes are not counted: statistics are empty.
    """
    torch.manual_seed(seed)
    length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    first, drafts = _FirstToken(), any(name in settings for name in DRAFTING)
    begin = time.perf_counter()
    output = model.generate(**inputs, **settings, **({"streamer": first} if rows == 1 and not drafts else {}))
    seconds = time.perf_counter() - begin
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = [_until(row, ends) for row in output[:, length:].tolist()]
    emitted = sum(map(len, answers)) - rows
    statistics = Statistics() if drafts else Statistics(num_spec_steps=emitted, num_emitted_tokens=emitted)
    return Run(answers, seconds, first.at - begin if first.at else None, statistics)


def ours(
    engine: SpeculativeVLM, inputs: dict[str, Any], settings: dict[str, Any], seed: int, warm: bool = False
) -> Run:
    """Our loop with empty caches, and once more with the photos encoded if `warm`."""
    engine.target.vision.clear()
    begin = time.perf_counter()
    answer = engine.generate(**inputs, **settings, seed=seed)
    seconds, again = time.perf_counter() - begin, None
    if warm:
        begin = time.perf_counter()
        engine.generate(**inputs, **settings, seed=seed)
        again = time.perf_counter() - begin
    results = answer if isinstance(answer, list) else [answer]
    statistics = results[0].statistics
    return Run([r.tokens for r in results], seconds, statistics.seconds["prefill"], statistics, again)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends an answer, which is kept; padding comes after it."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]
