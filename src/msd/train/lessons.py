"""Lessons for a drafter: which captured answers a step trains on, and the live target's word on them.

Two stages (MSD as published, arXiv 2505.14260, section 3.3): text-only answers first, then a share of answers about
images that rises to one. Everything follows from (seed, step). The target runs online; nothing but answers is on disk.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msd import prompts
from msd.errors import UserError
from msd.gain import ModalityCuts
from msd.targets import Target
from msd.targets.teacher import Lesson, teach
from msd.train.captured import Captured


@dataclass(frozen=True)
class Stages:
    """text: steps of stage 1. rise: steps of stage 2 until every answer is about an image, from half of them on.

    keep: share of text-only answers that remains after that.
    """

    text: int = 20
    rise: int = 60
    keep: float = 0.05

    def share(self, step: int) -> float:
        """The share of answers about images at a step."""
        if step < self.text:
            return 0.0
        return min(1.0 - self.keep, 0.5 + 0.5 * (step - self.text) / max(1, self.rise))


class Lessons:
    """Draws batches of `batch` captured answers of one split and has the target teach them."""

    def __init__(
        self,
        target: Target,
        processor: Any,
        captured: Sequence[Captured],
        cuts: ModalityCuts,
        batch: int = 8,
        stages: Stages | None = None,
        seed: int = 0,
    ) -> None:
        self.target, self.processor, self.cuts = target, processor, cuts
        self.batch, self.stages, self.seed = batch, stages or Stages(), seed
        long_enough = [c for c in captured if len(c.ids) > 1]
        self.pools = {
            True: [c for c in long_enough if c.images],
            False: [c for c in long_enough if not c.images],
        }
        if not long_enough:
            raise UserError("no captured answer has two tokens or more, so there is nothing to draft; capture more")

    def __call__(self, step: int) -> tuple[Lesson, Tensor]:
        """The lesson of a step, and the modality labels [B, A] of its answer tokens."""
        return self.teach(self.drawn(step))

    def drawn(self, step: int) -> list[Captured]:
        """The answers of a step, alike in length: every answer of a pool comes once before any comes again."""
        rng = random.Random(f"{self.seed}-{step}")
        share = self.stages.share(step)
        about_images = [rng.random() < share for _ in range(self.batch)]
        return [self._next(kind, step, i) for i, kind in enumerate(about_images)]

    def _next(self, images: bool, step: int, place: int) -> Captured:
        """A row of a pool, or of the other one if it is empty; walked through in a new order each pass."""
        pool = self.pools[images] or self.pools[not images]
        lap, at = divmod(step * self.batch + place, len(pool))
        return pool[random.Random(f"{self.seed}-{images}-{lap}").sample(range(len(pool)), len(pool))[at]]

    def teach(self, answers: Sequence[Captured]) -> tuple[Lesson, Tensor]:
        """The target's pass over some captured answers, and their labels."""
        inputs = prompts.prepare(self.processor, [list(a.images) for a in answers], [a.prompt for a in answers])
        inputs = {k: v.to(self.target.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        lesson = teach(self.target, inputs, [a.ids for a in answers])
        labels = torch.zeros_like(lesson.answers)
        for row, answer in enumerate(answers):
            labels[row, : len(answer.ids)] = self.cuts.labels(answer.gain).to(labels.device)
        return lesson, labels

    def roots(self, lesson: Lesson, count: int) -> Tensor:
        """Up to `count` answer tokens per row to draft from, [B, A], drawn with torch's generator.

        A row with fewer repeats some, so that every row has as many.
        """
        columns = []
        for length in lesson.lengths:
            order = torch.randperm(length - 1)
            columns.append(order.repeat(count // len(order) + 1)[:count].sort().values)
        return torch.stack(columns).to(lesson.logits.device)


def token_counts(captured: Sequence[Captured], vocabulary: int) -> Tensor:
    """How often the target wrote each token, [V] int64."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for token, n in Counter(t for c in captured for t in c.ids).items():
        counts[token] = n
    return counts
