"""TargetWriter: the target's own greedy answers, written with its images, and the image gain of every answer token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.config import SpeculativeConfig
from msd.core.tree import Step
from msd.drafters.algorithms.plain import Plain
from msd.errors import UserError
from msd.events import open_chunks
from msd.events.auxiliary import costs_of_recordings
from msd.inputs.prompts import prepare
from msd.labels.gain import assert_images_matter, image_gain
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.system.files import named_in
from msd.train.capture import Answer, Prompt

DIGITS = 4  # of a gain in nats


class Said:
    """The target's logits at every token of a batch: `rows[row]`, a [V] each. To be given as `on_step`.

    Nothing is drafted, so that a step has one position; the first step's is the prompt's last.
    """

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []

    def __call__(self, step: Step) -> None:
        """What the step's tokens came from, in rows that go on."""
        if step.prefill:
            self.rows = [[] for _ in step.accepted.tokens]
        for row, tokens in enumerate(step.accepted.tokens):
            if tokens and row not in step.accepted.padded:
                self.rows[row].append(step.scores.logits[row, -1])


class TargetWriter:
    """Writes answers for `capture`: plain greedy decoding in batches, then a blind teacher pass for the gains.

    Image placeholders are never written: the teacher would look for an image there. The first batch with images
    refuses a target that does not see them. folder: where image names start from. backend: how passes are computed;
    a lossy one writes answers that now and then take another way at a near tie, and gains that are a little off.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, folder: Path, max_new_tokens: int, backend: str = "measure"
    ) -> None:
        self.engine = SpeculativeVLM(model, processor, SpeculativeConfig(backend=backend), drafter=Plain())
        self.processor, self.folder, self.max_new_tokens = processor, folder, max_new_tokens
        self._sees = False

    def check(self, prompt: Prompt) -> None:
        """UserError for an image that cannot be read, a prompt that is refused, or one too long for the context."""
        length, context = self._prepare([prompt])["input_ids"].shape[1], self.engine.target.context_length
        if context is not None and length + self.max_new_tokens > context:
            raise UserError(
                f"{length} prompt tokens and {self.max_new_tokens} new ones do not fit the model's context of "
                f"{context}; shorten the prompt or lower --max-new-tokens"
            )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers in the order of the prompts; an image that several share is encoded once."""
        clips = [-1 if p.events is None else len(p.images) for p in prompts]  # frames, where events are labelled
        if len(set(clips)) > 1:
            parts = {n: iter(self([p for p, m in zip(prompts, clips, strict=True) if m == n])) for n in set(clips)}
            return [next(parts[n]) for n in clips]
        target, raw = self.engine.target, self._prepare(prompts)
        inputs = target.encode_images(raw)
        never = list(target.placeholders)
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "suppress_tokens": never}
        said = Said()
        results = self.engine.generate(**inputs, **settings, on_step=said)
        results = [results] if isinstance(results, Result) else results
        answers = [r.tokens for r in results]
        if not self._sees and any(raw.get(name) is not None for name in target.media_tensors):
            assert_images_matter(target, raw, answers)
            self._sees = True
        seeing = [torch.stack(logits) for logits in said.rows]
        gains = image_gain(target, inputs, answers, seeing)
        costs = self._costs(prompts, inputs, answers, seeing)
        return [
            _answer(result, _rounded(gain), None if cost is None else _rounded(cost))
            for result, gain, cost in zip(results, gains, costs, strict=True)
        ]

    def _costs(
        self, prompts: Sequence[Prompt], inputs: dict[str, Any], answers: list[list[int]], seeing: list[Tensor]
    ) -> Sequence[Tensor | None]:
        """What tokens owe to the events of their prompts, which all have some or none."""
        recordings = [open_chunks(named_in(self.folder, p.events)) for p in prompts if p.events is not None]
        if not recordings:
            return [None] * len(prompts)
        frames = [len(p.images) for p in prompts]
        return costs_of_recordings(self.engine.target, inputs, answers, recordings, frames, seeing)

    def _prepare(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Processor output of a batch."""
        images = [[named_in(self.folder, name) for name in p.images] for p in prompts]
        return prepare(self.processor, images, [p.text for p in prompts])


def _rounded(nats: Tensor) -> Any:
    """As a tuple, or a tuple of tuples, with a few digits."""
    values = nats.numpy().round(DIGITS).tolist()
    return tuple(values if nats.dim() == 1 else map(tuple, values))


def _answer(result: Result, gain: tuple[float, ...], costs: tuple[tuple[float, ...], ...] | None) -> Answer:
    """The end token is kept apart; an answer that a stop string ended is finished without one."""
    ended = result.finish == "eos"
    ids = tuple(result.tokens[:-1] if ended else result.tokens)
    end = result.tokens[-1] if ended else None
    return Answer(result.text, ids, result.finish in ("eos", "criteria"), end, gain, costs)
