"""Lessons for a drafter: which captured answers a step trains on, and the live target's word on them.

Two stages (MSD as published, arXiv 2505.14260, section 3.3): text-only answers first, then a share of answers about
images that rises to one. Everything follows from (seed, step). The target runs online; nothing but answers is on disk.
What it said of a batch is remembered as far as memory is given, so that later passes over the answers need no target.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msd import prompts
from msd.cuts import ModalityCuts
from msd.errors import UserError
from msd.event_tokens import event_tokens
from msd.events import open_chunks
from msd.targets import Target
from msd.targets.teacher import Lesson, teach
from msd.train.captured import Captured
from msd.train.notebook import Notebook

WINDOW = 16  # batches among which answers are sorted by length


@dataclass(frozen=True)
class Stages:
    """text: steps of stage 1. rise: steps of stage 2 until every answer is about an image, from half of them on.

    keep: share of text-only answers that remains after that.
    """

    text: int = 75
    rise: int = 300
    keep: float = 0.05

    def share(self, step: int) -> float:
        """The share of answers about images at a step."""
        if step < self.text:
            return 0.0
        return min(1.0 - self.keep, 0.5 + 0.5 * (step - self.text) / max(1, self.rise))


class Lessons:
    """Draws batches of `batch` captured answers of one split and has the target teach them.

    share: (rank, processes); every process takes its part of the same batch. dtype: of the target's matrix products,
    its weights' own by default. The lessons' `logits` are log p over the notebook's vocabulary alone.
    """

    def __init__(
        self,
        target: Target,
        processor: Any,
        captured: Sequence[Captured],
        cuts: ModalityCuts,
        notebook: Notebook,
        batch: int = 8,
        stages: Stages | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.target, self.processor, self.cuts, self.notebook = target, processor, cuts, notebook
        self.batch, self.stages, self.seed, self.share = batch, stages or Stages(), seed, share
        self.dtype = dtype
        long_enough = [c for c in captured if len(c.ids) > 1]
        self.pools = {
            True: [c for c in long_enough if c.images],
            False: [c for c in long_enough if not c.images],
        }
        if not long_enough:
            raise UserError("no captured answer has two tokens or more, so there is nothing to draft; capture more")
        self.batches = {images: self._batches(images) for images in (True, False)}
        self._kinds: list[bool] = []
        self._laps: dict[bool, tuple[int, list[int]]] = {}

    def __call__(self, step: int) -> tuple[Lesson, Tensor]:
        """The lesson of a step, and the modality labels [B, A] of its answer tokens."""
        return self._lesson(*self._drawn(step))

    def read_ahead(self, told: Callable[[int, int], None] | None = None) -> None:
        """Has all batches taught, as far as the notebook has room; `told(done, total)` after each."""
        every = [(images, at) for images, batches in self.batches.items() for at in range(len(batches))]
        for done, (images, at) in enumerate(every, 1):
            self._lesson(images, at)
            if told:
                told(done, len(every))

    def _lesson(self, images: bool, at: int) -> tuple[Lesson, Tensor]:
        rank, processes = self.share
        answers = self._answers(images, at)  # the same in every run, so that runs can share a notebook
        key = images, at, self.batch, rank, processes
        return self.notebook.recall(key, lambda: self.teach(answers[rank::processes] or answers[:1]))

    def drawn(self, step: int) -> list[Captured]:
        """The answers of a step: of one kind (about images or not), alike in length."""
        return self._answers(*self._drawn(step))

    def in_turn(self, answers: Sequence[Captured]) -> Iterator[tuple[Lesson, Tensor]]:
        """Lessons on `answers` in batches, in their order."""
        for start in range(0, len(answers), self.batch):
            some = tuple(answers[start : start + self.batch])
            yield self.notebook.recall(some, lambda some=some: self.teach(some))  # type: ignore[misc]

    def _answers(self, images: bool, at: int) -> list[Captured]:
        return [self.pools[images][i] for i in self.batches[images][at]]

    def _drawn(self, step: int) -> tuple[bool, int]:
        """(kind, which of its batches) of a step: all of them once in each lap, in a new order."""
        images = self._about_images(step)
        before = sum(self._about_images(s) == images for s in range(step)) if all(self.pools.values()) else step
        images = images if self.pools[images] else not images
        count = len(self.batches[images])
        lap, at = divmod(before, count)
        if self._laps.get(images, (-1, []))[0] != lap:
            self._laps[images] = lap, random.Random(f"{self.seed}-{images}-{lap}").sample(range(count), count)
        return images, self._laps[images][1][at]

    def _about_images(self, step: int) -> bool:
        while len(self._kinds) <= step:
            at = len(self._kinds)
            self._kinds.append(random.Random(f"{self.seed}-{at}").random() < self.stages.share(at))
        return self._kinds[step]

    def _batches(self, images: bool) -> list[list[int]]:
        """Every answer of a pool once but for a rest, those of a batch alike in length."""
        pool = self.pools[images]
        if not pool:
            return []
        order = random.Random(f"batches {images}").sample(range(len(pool)), len(pool))
        size, batches = min(self.batch, len(pool)), []
        for start in range(0, len(order), WINDOW * size):
            near = sorted(order[start : start + WINDOW * size], key=lambda i: len(pool[i].ids))
            batches += [near[k : k + size] for k in range(0, len(near) - size + 1, size)]
        return batches

    def teach(self, answers: Sequence[Captured]) -> tuple[Lesson, Tensor]:
        """The target's pass over some captured answers, whole, and their labels."""
        beside = self._beside(answers)
        inputs = prompts.prepare(self.processor, [list(a.images) for a in answers], [a.prompt for a in answers])
        inputs = {k: v.to(self.target.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        lesson = teach(self.target, inputs, [a.ids for a in answers], dtype=self.dtype)
        labels = torch.zeros_like(lesson.answers)
        for row, answer in enumerate(answers):
            labels[row, : len(answer.ids)] = answer.labels(self.cuts).to(labels.device)
        lesson.beside = beside
        return lesson, labels

    def _beside(self, answers: Sequence[Captured]) -> Tensor | None:
        """[B, E, H] tokens of the answers' event recordings, zero in rows without; None where none has one."""
        files = [a.events for a in answers]
        found = [None if f is None else event_tokens(self.target, self.processor, open_chunks(f)) for f in files]
        some = next((tokens for tokens in found if tokens is not None), None)
        return None if some is None else torch.stack([torch.zeros_like(some) if t is None else t for t in found])

    def roots(self, lesson: Lesson, count: int) -> Tensor:
        """Up to `count` different answer tokens per row to draft from, [B, A], drawn with torch's generator.

        A row with fewer is filled up with its last token, below which there is nothing to draft.
        """
        columns, count = [], min(count, max(lesson.lengths) - 1)
        for length in lesson.lengths:
            chosen = torch.randperm(length - 1)[:count].sort().values
            columns.append(torch.nn.functional.pad(chosen, (0, count - len(chosen)), value=length - 1))
        return torch.stack(columns).to(lesson.answers.device)


def token_counts(captured: Sequence[Captured], vocabulary: int) -> Tensor:
    """How often the target wrote each token, [V] int64."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for token, n in Counter(t for c in captured for t in c.ids).items():
        counts[token] = n
    return counts
