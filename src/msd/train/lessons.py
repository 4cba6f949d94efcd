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

WINDOW = 16  # batches among which answers are sorted by length


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
    """Draws batches of `batch` captured answers of one split and has the target teach them.

    share: (rank, processes); every process takes its part of the same batch. dtype: of the target's matrix products,
    its weights' own by default.
    """

    def __init__(
        self,
        target: Target,
        processor: Any,
        captured: Sequence[Captured],
        cuts: ModalityCuts,
        batch: int = 8,
        stages: Stages | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.target, self.processor, self.cuts = target, processor, cuts
        self.batch, self.stages, self.seed, self.share = batch, stages or Stages(), seed, share
        self.dtype = dtype
        long_enough = [c for c in captured if len(c.ids) > 1]
        self.pools = {
            True: [c for c in long_enough if c.images],
            False: [c for c in long_enough if not c.images],
        }
        if not long_enough:
            raise UserError("no captured answer has two tokens or more, so there is nothing to draft; capture more")
        self._kinds: list[bool] = []
        self._laps: dict[tuple[bool, int], list[list[int]]] = {}

    def __call__(self, step: int) -> tuple[Lesson, Tensor]:
        """The lesson of a step, and the modality labels [B, A] of its answer tokens."""
        rank, processes = self.share
        answers = self.drawn(step)
        return self.teach(answers[rank::processes] or answers[:1])

    def drawn(self, step: int) -> list[Captured]:
        """The answers of a step: of one kind (about images or not), alike in length."""
        images = self._about_images(step)
        pool = self.pools[images] or self.pools[not images]
        before = sum(self._about_images(s) == images for s in range(step)) if all(self.pools.values()) else step
        size = min(self.batch, len(pool))
        lap, at = divmod(before, len(pool) // size)
        return [pool[i] for i in self._lap(pool, images, lap)[at]]

    def _about_images(self, step: int) -> bool:
        while len(self._kinds) <= step:
            at = len(self._kinds)
            self._kinds.append(random.Random(f"{self.seed}-{at}").random() < self.stages.share(at))
        return self._kinds[step]

    def _lap(self, pool: list[Captured], images: bool, lap: int) -> list[list[int]]:
        """Batches of one pass over a pool: every answer once but for a rest, in a new order each pass."""
        if (images, lap) not in self._laps:
            rng = random.Random(f"{self.seed}-{images}-{lap}")
            order, size = rng.sample(range(len(pool)), len(pool)), min(self.batch, len(pool))
            batches = []
            for start in range(0, len(order), WINDOW * size):
                near = sorted(order[start : start + WINDOW * size], key=lambda i: len(pool[i].ids))
                batches += [near[k : k + size] for k in range(0, len(near) - size + 1, size)]
            rng.shuffle(batches)
            self._laps = {(images, lap): batches} | {k: v for k, v in self._laps.items() if k[0] != images}
        return self._laps[images, lap]

    def teach(self, answers: Sequence[Captured]) -> tuple[Lesson, Tensor]:
        """The target's pass over some captured answers, and their labels."""
        inputs = prompts.prepare(self.processor, [list(a.images) for a in answers], [a.prompt for a in answers])
        inputs = {k: v.to(self.target.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        lesson = teach(self.target, inputs, [a.ids for a in answers], dtype=self.dtype)
        labels = torch.zeros_like(lesson.answers)
        for row, answer in enumerate(answers):
            labels[row, : len(answer.ids)] = self.cuts.labels(answer.gain).to(labels.device)
        return lesson, labels

    def roots(self, lesson: Lesson, count: int) -> Tensor:
        """Up to `count` different answer tokens per row to draft from, [B, A], drawn with torch's generator.

        A row with fewer is filled up with its last token, below which there is nothing to draft.
        """
        columns = []
        for length in lesson.lengths:
            chosen = torch.randperm(length - 1)[:count].sort().values
            columns.append(torch.nn.functional.pad(chosen, (0, count - len(chosen)), value=length - 1))
        return torch.stack(columns).to(lesson.logits.device)


def token_counts(captured: Sequence[Captured], vocabulary: int) -> Tensor:
    """How often the target wrote each token, [V] int64."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for token, n in Counter(t for c in captured for t in c.ids).items():
        counts[token] = n
    return counts
