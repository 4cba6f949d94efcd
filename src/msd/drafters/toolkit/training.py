"""What training asks of a draft network: the target at the drafted positions, a loss, and how many drafts are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msd.core import modality
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.drafters.toolkit.context import pick
from msd.targets.teacher import TeacherBatch

CHAIN = 5  # depth of the chains that acceptance is measured on
TeacherBatches = Callable[[], Iterable[tuple[TeacherBatch, Tensor]]]


@dataclass
class Truth:
    """The target at the positions drafted below A answer tokens per row, D each.

    p: [B, A, D, Vd] its distribution over the draft vocabulary, summing to at most 1. state: [B, A, D, H], its final
    state. token: [B, A, D] the answer's. valid: [B, A, D] bool, False beyond the answer's end.
    """

    p: Tensor
    state: Tensor
    token: Tensor
    valid: Tensor

    @classmethod
    def of(cls, batch: TeacherBatch, first: Tensor, depth: int, hidden: int) -> Truth:
        """Below the answer tokens `first` [B, A]."""
        assert batch.taps is not None
        index, valid = drafted(batch, first, depth)
        state = batch.taps[:, batch.prompt - 1 : -1, -hidden:]
        return cls(read(batch.logits, index).exp(), read(state, index), read(batch.answers, index), valid)

    def mean(self, values: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """The mean of values [B, A, D] over valid positions, weighed."""
        w = self.valid * weight
        return (values * w).sum() / w.sum().clamp_min(1e-6)


def drafted(batch: TeacherBatch, first: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Which answer tokens are drafted below the answer tokens `first` [B, A]: (index [B, A, D], valid [B, A, D])."""
    index = first[..., None] + torch.arange(1, depth + 1, device=first.device)
    return index, index < torch.tensor(batch.lengths, device=first.device)[:, None, None]


def everywhere(batch: TeacherBatch) -> Tensor:
    """[B, A]: every answer token but the last one."""
    answers = batch.answers
    return torch.arange(max(batch.lengths) - 1, device=answers.device).expand(len(answers), -1)


def read(values: Tensor, index: Tensor) -> Tensor:
    """values [B, T, ...] at index [B, A, D], beyond the end the last: [B, A, D, ...]."""
    at = index.clamp(0, values.shape[1] - 1)
    return pick(values, at.flatten(1)).unflatten(1, at.shape[1:])


def parents(batch: TeacherBatch, index: Tensor) -> Tensor:
    """The tokens [B, A, D] before the answer tokens `index`."""
    return read(batch.answers, index - 1)


def frequent(counts: Tensor, size: int) -> Tensor:
    """A draft vocabulary: the `size` most frequent ids by `counts` [V], ascending.

    Of equally frequent ones the lower: byte-pair vocabularies are in order of frequency in general text.
    """
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def count_chain(batch: TeacherBatch, labels: Tensor, guess: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    """[accepted, drafted] per modality name of chains of guesses [B, A, D] below answer tokens 0 to A-1.

    Below a rejection nothing counts. The batch's answers must be the target's greedy ones, which is what a draft is
    accepted against at temperature 0. labels: [B, T] modality ids of the answer tokens.
    """
    A, D = guess.shape[1:]
    index, valid = drafted(batch, torch.arange(A, device=guess.device).expand(len(guess), -1), D)
    right = guess == read(batch.answers, index)
    reached = torch.cat([torch.ones_like(right[..., :1]), right[..., :-1].cumprod(-1).bool()], -1)
    counts, kind = reached & valid, read(labels, index)
    return {
        name: [
            int((right & counts & (kind == modality.get(name).id)).sum()),
            int((counts & (kind == modality.get(name).id)).sum()),
        ]
        for name in names
    }


class Objective(nn.Module):
    """A network's published loss on batches whose logits are log p over its vocabulary."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: TeacherBatch, labels: Tensor, first: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts on drafts from the answer tokens `first` [B, A]; the methods do not read labels."""
        loss, parts = self.network.loss(batch, first)
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    @torch.no_grad()
    def acceptance(self, batch: TeacherBatch, labels: Tensor) -> dict[str, list[int]]:
        """[accepted, drafted] per modality name on top-1 chains from every answer token (see `count_chain`)."""
        answers, first = batch.answers, everywhere(batch)
        states = self.network.states(batch, first, min(CHAIN, self.network.config.depth))
        guesses = []
        for d in range(states.shape[2]):  # a level at a time: distributions over a whole vocabulary are large
            above = answers.gather(1, (first + d).clamp_max(answers.shape[1] - 1))
            guesses.append(self.network.ids[self.network.logits(states[:, :, d], above).argmax(-1)])
        names = [m.name for m in (LANGUAGE, VISION, FUSION)]
        return count_chain(batch, labels, torch.stack(guesses, -1), names)

    def reports(self, batches: TeacherBatches) -> dict[str, Any]:
        """What is measured or fitted once the network is trained, on held-out batches; by default nothing."""
        return {}
