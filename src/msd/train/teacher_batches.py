"""TeacherBatches for a drafter: which captured answers a step trains on, and the live target's predictions for them.

Two stages (MSD as published, arXiv 2505.14260, section 3.3): text-only answers first, then a share of answers about
images that rises to one. Everything follows from (seed, step). The target runs online; nothing but answers is on disk.
What it computed for a batch is kept in memory while there is room (`TeacherCache`): the tap states, the last of which is
what the target's output layer reads, and the normaliser of every distribution. Distributions over the draft
vocabulary follow from these. A batch is the same bits whether it was just taught or recalled, so a run that was
stopped goes on to the same result.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from msd.drafters.auxiliary import stacked
from msd.errors import UserError
from msd.events.auxiliary import event_tokens
from msd.inputs import prompts
from msd.labels.label_thresholds import ModalityThresholds
from msd.targets import Target
from msd.targets.teacher import TeacherBatch, teach
from msd.train.capture import Captured

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
        return self._rising(step, 0.5)

    def _rising(self, step: int, first: float) -> float:
        if step < self.text:
            return 0.0
        return min(1.0 - self.keep, first + (1 - first) * (step - self.text) / max(1, self.rise))


@dataclass(frozen=True)
class PublishedStages(Stages):
    """Stages as a method was published with them. first: share of answers about images when stage 2 begins."""

    first: float = 0.5

    @classmethod
    def of(cls, shares: tuple[float, float, float, float], steps: int) -> PublishedStages:
        """Of a run of `steps` steps; shares: see `DraftNetwork.stages`."""
        text, rise, first, keep = shares
        return cls(round(text * steps), round(rise * steps), keep, first)

    def share(self, step: int) -> float:
        """See `Stages`."""
        return self._rising(step, self.first)


Taught = tuple[TeacherBatch, Tensor]


class TeacherCache:
    """Keeps teacher_batches while they fit into `gigabytes`; later ones are taught anew each time.

    head: the target's output layer; ids [Vd]: the draft vocabulary; layers: the tapped ones, of which the last feeds
    the head. A head whose logits are more than its product with the last tap (soft-capped, scaled) is found on the
    first taught, and nothing is noted then.
    """

    def __init__(
        self,
        head: nn.Module,
        ids: Tensor,
        layers: Sequence[int],
        gigabytes: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.head, self.layers = head, tuple(layers)
        self.left, self.dtype = gigabytes * 1e9, dtype
        self._read_as(ids, layers)
        self.plain: bool | None = None  # whether the head is nothing but its matrix
        self._notes: dict[Hashable, tuple[TeacherBatch, Tensor]] = {}

    def read_by(self, ids: Tensor, layers: Sequence[int]) -> TeacherCache:
        """The same notes for a network that drafts other words from some of the layers.

        ValueError for a layer that was not noted, or another last one.
        """
        if not set(layers) <= set(self.layers) or layers[-1] != self.layers[-1]:
            raise ValueError(f"layers {tuple(layers)} cannot be read from notes of layers {self.layers}")
        other = copy(self)
        other._read_as(ids, layers)
        return other

    def _read_as(self, ids: Tensor, layers: Sequence[int]) -> None:
        params = {name: p.detach() for name, p in self.head.named_parameters(recurse=False)}
        self.ids = ids.to(params["weight"].device)
        self.rows = params["weight"][self.ids].float()
        self.bias = params["bias"][self.ids].float() if "bias" in params else None
        self.columns = [self.layers.index(layer) for layer in layers]

    def recall(self, key: Hashable, teach: Callable[[], Taught]) -> Taught:
        """The batch known as `key`, its `logits` being log p over the draft vocabulary [B, A, Vd], and its labels."""
        if key not in self._notes:
            taught, labels = teach()
            if not self._is_plain(taught):
                logits = taught.logits.log_softmax(-1)[..., self.ids]
                return replace(taught, taps=self._read_layers(taught), logits=logits), labels
            assert taught.taps is not None
            noted = replace(
                taught,
                taps=taught.taps.to(self.dtype),
                logits=taught.logits.logsumexp(-1, keepdim=True),
            )
            parts = (noted.taps, noted.logits, noted.auxiliary, labels)
            size = sum(t.numel() * t.element_size() for t in parts if t is not None)
            if size > self.left:
                return self._read(noted), labels
            self.left -= size
            self._notes[key] = noted, labels
        noted, labels = self._notes[key]
        return self._read(noted), labels

    def _read(self, noted: TeacherBatch) -> TeacherBatch:
        taps = self._read_layers(noted).float()
        return replace(noted, taps=taps, logits=self._logits(noted, taps) - noted.logits)

    def _read_layers(self, taught: TeacherBatch) -> Tensor:
        """The states of the layers that are read, [B, L, T*H]."""
        assert taught.taps is not None
        every = taught.taps.unflatten(-1, (len(self.layers), -1))
        return every[:, :, self.columns].flatten(2)

    def _logits(self, taught: TeacherBatch, taps: Tensor) -> Tensor:
        last = taps[:, taught.prompt - 1 : -1, -self.rows.shape[1] :]
        return nn.functional.linear(last, self.rows, self.bias)

    def _is_plain(self, taught: TeacherBatch) -> bool:
        """Whether the head's logits follow from the last tap; looked at once."""
        if self.plain is None:
            assert taught.taps is not None
            gap = (self._logits(taught, taught.taps.float()) - taught.logits[..., self.ids])[taught.answer_mask()]
            self.plain = bool(gap.abs().max() < 0.02 * taught.logits.abs().max())
        return self.plain


class TeacherBatches:
    """Draws batches of `batch` captured answers of one split and has the target teach them.

    share: (rank, processes); every process takes its part of the same batch. dtype: of the target's matrix products,
    its weights' own by default. The teacher_batches' `logits` are log p over the notebook's vocabulary alone.
    """

    def __init__(
        self,
        target: Target,
        processor: Any,
        captured: Sequence[Captured],
        thresholds: ModalityThresholds,
        notebook: TeacherCache,
        batch: int = 8,
        stages: Stages | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.target, self.processor, self.thresholds, self.notebook = target, processor, thresholds, notebook
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

    def __call__(self, step: int) -> tuple[TeacherBatch, Tensor]:
        """The taught of a step, and the modality labels [B, A] of its answer tokens."""
        return self._lesson(*self._drawn(step))

    def read_ahead(self, told: Callable[[int, int], None] | None = None) -> None:
        """Has all batches taught, as far as the notebook has room; `told(done, total)` after each."""
        every = [(images, at) for images, batches in self.batches.items() for at in range(len(batches))]
        for done, (images, at) in enumerate(every, 1):
            self._lesson(images, at)
            if told:
                told(done, len(every))

    def _lesson(self, images: bool, at: int) -> tuple[TeacherBatch, Tensor]:
        rank, processes = self.share
        answers = self._answers(images, at)  # the same in every run, so that runs can share a notebook
        key = images, at, self.batch, rank, processes
        return self.notebook.recall(key, lambda: self.teach(answers[rank::processes] or answers[:1]))

    def drawn(self, step: int) -> list[Captured]:
        """The answers of a step: of one kind (about images or not), alike in length."""
        return self._answers(*self._drawn(step))

    def in_turn(self, answers: Sequence[Captured]) -> Iterator[tuple[TeacherBatch, Tensor]]:
        """TeacherBatches on `answers` in batches, in their order."""
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

    def teach(self, answers: Sequence[Captured]) -> tuple[TeacherBatch, Tensor]:
        """The target's pass over some captured answers, whole, and their labels."""
        auxiliary = self._auxiliary(answers)
        inputs = prompts.prepare(self.processor, [list(a.images) for a in answers], [a.prompt for a in answers])
        inputs = {k: v.to(self.target.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        taught = teach(self.target, inputs, [a.ids for a in answers], dtype=self.dtype)
        labels = torch.zeros_like(taught.answers)
        for row, answer in enumerate(answers):
            labels[row, : len(answer.ids)] = answer.labels(self.thresholds).to(labels.device)
        taught.auxiliary = auxiliary
        return taught, labels

    def _auxiliary(self, answers: Sequence[Captured]) -> Tensor | None:
        """Encodes the answers' event recordings as tokens [B, E, H], zero in rows without; None if no row has one."""
        files = [a.events for a in answers]
        if not any(files):
            return None
        return stacked([None if f is None else event_tokens(self.target, self.processor, f) for f in files])

    def roots(self, taught: TeacherBatch, count: int) -> Tensor:
        """Up to `count` different answer tokens per row to draft from, [B, A], drawn with torch's generator.

        A row with fewer is filled up with its last token, below which there is nothing to draft.
        """
        columns, count = [], min(count, max(taught.lengths) - 1)
        for length in taught.lengths:
            chosen = torch.randperm(length - 1)[:count].sort().values
            columns.append(torch.nn.functional.pad(chosen, (0, count - len(chosen)), value=length - 1))
        return torch.stack(columns).to(taught.answers.device)


def token_counts(captured: Sequence[Captured], vocabulary: int) -> Tensor:
    """How often the target wrote each token, [V] int64."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for token, n in Counter(t for c in captured for t in c.ids).items():
        counts[token] = n
    return counts
