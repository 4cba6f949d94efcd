"""TargetWriter: generates the target's answers and computes the image gain of every answer token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from msd.train.capture import Answer, Decoding, Prompt

DIGITS = 4  # decimal places of a gain in nats


class LogitsRecorder:
    """Records the target's logits at every token of plain decoding, as `on_step`: `rows[row]` is a list of [V].

    Without drafts a step has one position per row; the prefill step's is the last position of the prompt.
    """

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []

    def __call__(self, step: Step) -> None:
        """Records the step's logits in the rows that are still generating."""
        if step.prefill:
            self.rows = [[] for _ in step.accepted.tokens]
        for row, tokens in enumerate(step.accepted.tokens):
            if tokens and row not in step.accepted.padded:
                self.rows[row].append(step.scores.logits[row, -1])


class TargetWriter:
    """Writes answers for `capture`: plain decoding in batches, then a pass without images for the gains.

    Image placeholders are never generated: in the teacher pass they would need image features. The first batch with
    images raises UserError if they do not change the target's logits. folder: image names are relative to it. backend:
    how passes are computed; with a lossy one, answers may differ at near ties, and gains are approximate. decoding:
    greedy or sampled; gains are of the target's own probabilities, at any temperature.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, folder: Path, max_new_tokens: int, backend: str = "measure",
        decoding: Decoding | None = None,
    ) -> None:  # fmt: skip
        self.decoding = decoding or Decoding()
        self.engine = SpeculativeVLM(model, processor, SpeculativeConfig(backend=backend), drafter=Plain())
        self.processor, self.folder, self.max_new_tokens = processor, folder, max_new_tokens
        self._images_checked = False

    def check(self, prompt: Prompt) -> None:
        """Raises UserError for an unreadable image, an invalid prompt, or one too long for the target's context."""
        length, context = self._prepare([prompt])["input_ids"].shape[1], self.engine.target.context_length
        if context is not None and length + self.max_new_tokens > context:
            raise UserError(
                f"{length} prompt tokens and {self.max_new_tokens} new ones do not fit the model's context of "
                f"{context}; shorten the prompt or lower --max-new-tokens"
            )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Returns the answers in the order of the prompts; an image that several prompts share is encoded once."""
        kinds = [-1 if p.events is None else len(p.images) for p in prompts]  # number of frames, -1 without events
        if len(set(kinds)) > 1:  # a labelling pass needs one number of frames
            parts = {n: iter(self([p for p, m in zip(prompts, kinds, strict=True) if m == n])) for n in set(kinds)}
            return [next(parts[n]) for n in kinds]
        target, raw = self.engine.target, self._prepare(prompts)
        inputs = target.encode_images(raw)
        answers, logits = self.generate(prompts, inputs)
        tokens = [answer.tokens for answer in answers]
        if not self._images_checked and any(raw.get(name) is not None for name in target.media_tensors):
            assert_images_matter(target, raw, tokens)
            self._images_checked = True
        gains = image_gain(target, inputs, tokens, logits)
        costs = self._costs(prompts, inputs, tokens, logits)
        return [
            replace(answer, gain=_rounded(gain), costs=None if cost is None else _rounded(cost))
            for answer, gain, cost in zip(answers, gains, costs, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt], inputs: dict[str, Any]) -> tuple[list[Answer], list[Tensor]]:
        """Returns the answers, and the target's logits [T, V] at each one's tokens.

        inputs: the processor's output for the prompts, with images encoded.
        """
        recorder = LogitsRecorder()
        sampling: dict[str, Any] = {"do_sample": False}
        if self.decoding.sampled:
            seeds = [self.decoding.seed_of(prompt) for prompt in prompts]
            sampling = {"do_sample": True, "temperature": self.decoding.temperature, "seed": seeds}
        results = self.engine.generate(
            **inputs, **sampling, max_new_tokens=self.max_new_tokens,
            suppress_tokens=list(self.engine.target.placeholders), on_step=recorder,
        )  # fmt: skip
        results = [results] if isinstance(results, Result) else results
        return [_answer(result) for result in results], [torch.stack(row) for row in recorder.rows]

    def _costs(
        self, prompts: Sequence[Prompt], inputs: dict[str, Any], answers: list[list[int]], logits: list[Tensor]
    ) -> Sequence[Tensor | None]:
        """Returns the event costs of each answer's tokens. Either all prompts have events, or none has."""
        recordings = [open_chunks(named_in(self.folder, p.events)) for p in prompts if p.events is not None]
        if not recordings:
            return [None] * len(prompts)
        frames = [len(p.images) for p in prompts]
        return costs_of_recordings(self.engine.target, inputs, answers, recordings, frames, logits)

    def _prepare(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Returns the processor's output for a batch."""
        images = [[named_in(self.folder, name) for name in p.images] for p in prompts]
        return prepare(self.processor, images, [p.text for p in prompts])


def _rounded(nats: Tensor) -> Any:
    """Rounds values [T] to a tuple, or [T, C] to a tuple of tuples."""
    values = nats.numpy().round(DIGITS).tolist()
    return tuple(values if nats.dim() == 1 else map(tuple, values))


def _answer(result: Result) -> Answer:
    """Separates the end token. An answer that a stop string ended is finished and has no end token."""
    ended = result.finish == "eos"
    ids = tuple(result.tokens[:-1] if ended else result.tokens)
    end = result.tokens[-1] if ended else None
    return Answer(result.text, ids, result.finish in ("eos", "criteria"), end)
