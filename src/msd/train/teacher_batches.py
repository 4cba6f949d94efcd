"""Training batches for a drafter: selects the captured answers of each step and computes the target's predictions.

Training has two stages (MSD, arXiv 2505.14260, section 3.3): text-only answers first, then a growing share of answers
about images. The batches are a function of (seed, step). The target runs online; its outputs are cached in memory
(`TeacherCache`). A cached batch is bit-identical to a recomputed one, so a resumed run gives the same result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from msd.drafters.auxiliary import stacked
from msd.drafters.toolkit.processes import anywhere, largest
from msd.errors import UserError
from msd.events.auxiliary import event_tokens
from msd.inputs import prompts
from msd.labels.label_thresholds import ModalityThresholds
from msd.targets import Target
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train.capture import Captured

WINDOW = 16  # batches among which answers are sorted by length

LabelledBatch = tuple[TeacherBatch, Tensor]  # and the modality labels [B, A] of its answer tokens


@dataclass(frozen=True)
class Stages:
    """The probability that a step trains on answers about images: 0 in stage 1, rising linearly in stage 2.

    text: steps of stage 1. first: the probability at the first step of stage 2. rise: steps from there until it would
    reach 1. keep: the probability of text-only answers that remains; the rise stops at 1 - `keep`.
    """

    text: int = 75
    rise: int = 300
    keep: float = 0.05
    first = 0.5  # no dataclass field: a run's settings are compared with those in its `run.json`

    def share(self, step: int) -> float:
        """Returns the probability at `step`, counted from 0."""
        if step < self.text:
            return 0.0
        return min(1.0 - self.keep, self.first + (1 - self.first) * (step - self.text) / max(1, self.rise))


@dataclass(frozen=True)
class PublishedStages(Stages):
    """The stages of a published method, with its own initial share `first` of answers about images."""

    first: float = 0.5

    @classmethod
    def for_run(cls, shares: tuple[float, float, float, float], steps: int) -> PublishedStages:
        """Returns the stages of a run of `steps` steps. shares: see `DraftNetwork.stages`."""
        text, rise, first, keep = shares
        return cls(round(text * steps), round(rise * steps), keep, first)


class TeacherCache:
    """Caches the target's outputs for training batches, up to `gigabytes`; other batches are recomputed each time.

    An entry holds the tap states and the log normaliser of each distribution. Log-probabilities over the draft
    vocabulary follow from them, because the last tap is the input of the output layer. If the output layer does more
    than a matrix product (soft-capping, scaling), the first batch shows it, and nothing is cached.

    head: the target's output layer. ids: [Vd] draft vocabulary. layers: the tapped layers; the last one feeds the head.
    together: all processes keep a batch or none does, because a pass of a split target needs all of them.
    """

    def __init__(
        self,
        head: nn.Module,
        ids: Tensor,
        layers: Sequence[int],
        gigabytes: float,
        dtype: torch.dtype = torch.bfloat16,
        together: bool = False,
    ) -> None:
        self.head, self.layers, self.dtype, self.together = head, tuple(layers), dtype, together
        self.bytes_left = gigabytes * 1e9
        self.head_is_linear: bool | None = None  # None: not checked yet
        self._entries: dict[Hashable, LabelledBatch] = {}
        self._select(ids, layers)

    def view(self, ids: Tensor, layers: Sequence[int]) -> TeacherCache:
        """Returns the same entries for a network with another draft vocabulary that reads some of the layers.

        Raises ValueError for a layer that is not cached, or another last layer.
        """
        if not set(layers) <= set(self.layers) or layers[-1] != self.layers[-1]:
            raise ValueError(f"layers {tuple(layers)} cannot be read from a cache of layers {self.layers}")
        other = copy(self)
        other._select(ids, layers)
        return other

    def _select(self, ids: Tensor, layers: Sequence[int]) -> None:
        params = {name: p.detach() for name, p in self.head.named_parameters(recurse=False)}
        self.ids = ids.to(params["weight"].device)
        self.weight = params["weight"][self.ids].float()  # [Vd, H]
        self.bias = params["bias"][self.ids].float() if "bias" in params else None
        self.columns = [self.layers.index(layer) for layer in layers]

    def get(self, key: Hashable, compute: Callable[[], LabelledBatch]) -> LabelledBatch:
        """Returns the batch `key`, from the cache or from `compute`, with its labels.

        `logits` of the result holds log p over the draft vocabulary, [B, A, Vd].
        """
        if key in self._entries:
            entry, labels = self._entries[key]
            return self._expand(entry), labels
        batch, labels = compute()
        if not self._check_head(batch):
            logits = batch.logits.log_softmax(-1)[..., self.ids]
            return replace(batch, taps=self._selected_taps(batch), logits=logits), labels
        entry = replace(batch, taps=batch.taps.to(self.dtype), logits=batch.logits.logsumexp(-1, keepdim=True))
        parts = (entry.taps, entry.logits, entry.auxiliary, labels)
        size = sum(t.numel() * t.element_size() for t in parts if t is not None)
        if not self._anywhere(size > self.bytes_left):
            self.bytes_left -= size
            self._entries[key] = entry, labels
        return self._expand(entry), labels

    def _expand(self, entry: TeacherBatch) -> TeacherBatch:
        taps = self._selected_taps(entry).float()
        return replace(entry, taps=taps, logits=self._logits(entry, taps) - entry.logits)

    def _selected_taps(self, batch: TeacherBatch) -> Tensor:
        """Returns the tap states of the selected layers, [B, L, T*H]."""
        by_layer = batch.taps.unflatten(-1, (len(self.layers), -1))
        return by_layer[:, :, self.columns].flatten(2)

    def _logits(self, batch: TeacherBatch, taps: Tensor) -> Tensor:
        last = taps[:, batch.prompt - 1 : -1, -self.weight.shape[1] :]
        return nn.functional.linear(last, self.weight, self.bias)

    def _check_head(self, batch: TeacherBatch) -> bool:
        """Returns whether the logits are the product of the last tap with the head's matrix; checked once."""
        if self.head_is_linear is None:
            gap = (self._logits(batch, batch.taps.float()) - batch.logits[..., self.ids])[batch.answer_mask()]
            linear = bool(gap.abs().max() < 0.02 * batch.logits.abs().max())
            self.head_is_linear = not self._anywhere(not linear)
        return self.head_is_linear

    def _anywhere(self, flag: bool) -> bool:
        return anywhere(flag, self.ids.device) if self.together else flag


class TeacherBatches:
    """Selects batches of `batch` captured answers and runs the target on them.

    share: (rank, processes); each process gets its part of the same batch. dtype: of the target's matrix products, by
    default that of its weights. `logits` of a batch holds log p over the draft vocabulary of `cache`.
    """

    def __init__(
        self,
        target: Target,
        processor: Any,
        captured: Sequence[Captured],
        thresholds: ModalityThresholds,
        cache: TeacherCache,
        batch: int = 8,
        stages: Stages | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.target, self.processor, self.thresholds, self.cache = target, processor, thresholds, cache
        self.batch, self.stages, self.seed, self.share = batch, stages or Stages(), seed, share
        self.dtype = dtype
        usable = [c for c in captured if len(c.ids) > 1]
        if not usable:
            raise UserError("no captured answer has two tokens or more, so there is nothing to draft; capture more")
        self.batches = {
            images: self._group([c for c in usable if bool(c.images) == images], images) for images in (True, False)
        }
        self._with_images: list[bool] = []  # by step
        self._orders: dict[bool, tuple[int, list[int]]] = {}  # by kind: (epoch, order of its batches)

    def __call__(self, step: int) -> LabelledBatch:
        """Returns the batch of a step."""
        return self._get(*self._index(step))

    def answers_at(self, step: int) -> list[Captured]:
        """Returns the answers of a step: all with images or all without, of similar lengths."""
        images, at = self._index(step)
        return self.batches[images][at]

    def fill_cache(self, report: Callable[[int, int], None] | None = None) -> None:
        """Computes all batches, as far as the cache has room; calls `report(done, total)` after each."""
        indices = [(images, at) for images, batches in self.batches.items() for at in range(len(batches))]
        for done, (images, at) in enumerate(indices, 1):
            self._get(images, at)
            if report:
                report(done, len(indices))

    def in_order(self, answers: Sequence[Captured]) -> Iterator[LabelledBatch]:
        """Yields batches of `answers`, in their order."""
        for start in range(0, len(answers), self.batch):
            some = tuple(answers[start : start + self.batch])
            yield self.cache.get(some, lambda some=some: self.compute(some))  # type: ignore[misc]

    def _get(self, images: bool, at: int) -> LabelledBatch:
        rank, processes = self.share
        answers = self.batches[images][at]  # the same for every seed, so that runs can share a cache
        key = images, at, self.batch, rank, processes
        return self.cache.get(key, lambda: self.compute(answers[rank::processes] or answers[:1]))

    def _index(self, step: int) -> tuple[bool, int]:
        """Returns (kind, batch number) of a step. Each epoch visits all batches of a kind once, in a new order."""
        images = self._draw_kind(step)
        before = sum(self._draw_kind(s) == images for s in range(step)) if all(self.batches.values()) else step
        images = images if self.batches[images] else not images
        count = len(self.batches[images])
        epoch, at = divmod(before, count)
        if self._orders.get(images, (-1, []))[0] != epoch:
            self._orders[images] = epoch, random.Random(f"{self.seed}-{images}-{epoch}").sample(range(count), count)
        return images, self._orders[images][1][at]

    def _draw_kind(self, step: int) -> bool:
        """Returns whether the step trains on answers about images."""
        while len(self._with_images) <= step:
            at = len(self._with_images)
            self._with_images.append(random.Random(f"{self.seed}-{at}").random() < self.stages.share(at))
        return self._with_images[step]

    def _group(self, answers: list[Captured], images: bool) -> list[list[Captured]]:
        """Groups answers of one kind into full batches of similar lengths, each answer at most once."""
        if not answers:
            return []
        order = random.Random(f"batches {images}").sample(answers, len(answers))
        size, batches = min(self.batch, len(answers)), []
        for start in range(0, len(order), WINDOW * size):
            window = sorted(order[start : start + WINDOW * size], key=lambda answer: len(answer.ids))
            batches += [window[k : k + size] for k in range(0, len(window) - size + 1, size)]
        return batches

    def compute(self, answers: Sequence[Captured]) -> LabelledBatch:
        """Runs the target over some captured answers, and labels their tokens."""
        auxiliary = self._auxiliary(answers)
        inputs = prompts.prepare(self.processor, [list(a.images) for a in answers], [a.prompt for a in answers])
        inputs = {k: v.to(self.target.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        batch = run_teacher(self.target, inputs, [a.ids for a in answers], dtype=self.dtype)
        labels = torch.zeros_like(batch.answers)
        for row, answer in enumerate(answers):
            labels[row, : len(answer.ids)] = self.thresholds.labels(answer.gain, answer.costs)
        return replace(batch, auxiliary=auxiliary), labels

    def _auxiliary(self, answers: Sequence[Captured]) -> Tensor | None:
        """Returns the tokens [B, E, H] of event recordings, zero in rows without one; None if no row has one."""
        files = [a.events for a in answers]
        if not any(files):
            return None
        return stacked([None if f is None else event_tokens(self.target, self.processor, f) for f in files])

    def roots(self, batch: TeacherBatch, count: int, prompt: int = 0, lengths: Sequence[int] | None = None) -> Tensor:
        """Draws up to `count` different answer tokens per row as roots of drafts, [B, A], with torch's generator.

        prompt: the last tokens of the prompt to draw from too, as negative indices. A shorter row is padded with its
        last token, which has nothing after it to draft. lengths: of the answers of all processes, so that a row has the
        roots it would have in one process; by default those of `batch`. A process without answers of its own, which
        holds another's, drafts nothing.
        """
        rank, shares = self.share
        if prompt:  # a root has a real column before it
            shortest = -largest(batch.answers.new_tensor(max(batch.layout.start) - batch.prompt))
            prompt = max(0, min(prompt, int(shortest) - 1))
        lengths = batch.lengths if lengths is None else lengths
        columns, count = [], min(count, max(lengths) - 1 + prompt)
        for length in lengths:
            chosen = torch.randperm(length - 1 + prompt)[:count].sort().values - prompt
            columns.append(torch.nn.functional.pad(chosen, (0, count - len(chosen)), value=length - 1))
        own = columns[rank::shares] or [torch.full((count,), batch.lengths[0] - 1)]
        return torch.stack(own).to(batch.answers.device)
