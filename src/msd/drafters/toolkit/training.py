"""The interface between training and a draft network: the target at drafted positions, the loss, chain acceptance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.core import modality
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.drafters.toolkit import processes
from msd.drafters.toolkit.context import pick
from msd.targets.teacher import TeacherBatch

CHAIN = 5  # depth of the chains that acceptance is measured on
ENDING = 0.2  # weight of the loss of the ending probe, which reaches nothing else
LabelledBatches = Callable[[], Iterable[tuple[TeacherBatch, Tensor]]]  # batches with modality ids [B, T] of the answers


@dataclass
class TargetOutputs:
    """The target at the D positions drafted below each of A roots per row: tensors [B, A, D, ...].

    p: its distribution over the draft vocabulary (sums to at most 1). state: its final hidden state. token: the
    answer's token. valid: bool, False beyond the answer's end.
    """

    p: Tensor
    state: Tensor
    token: Tensor
    valid: Tensor

    @classmethod
    def of(cls, batch: TeacherBatch, roots: Tensor, depth: int, hidden: int) -> TargetOutputs:
        """Gathers them below the answer tokens `roots` [B, A]."""
        index, valid = drafted(batch, roots, depth)
        state = read(final_states(batch, hidden), index)
        return cls(read(batch.logits, index).exp(), state, read(batch.answers, index), valid)

    def mean(self, values: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """Weighted mean of values [B, A, D] over valid positions, also those of other processes (`processes.mean`)."""
        return processes.mean(values, self.valid * weight)


def final_states(batch: TeacherBatch, hidden: int) -> Tensor:
    """Returns the target's final hidden states [B, T, H] that predict the answer tokens."""
    return batch.taps[:, batch.prompt - 1 : -1, -hidden:]


def drafted(batch: TeacherBatch, roots: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Answer tokens drafted below `roots` [B, A]: (index [B, A, D], valid [B, A, D] bool).

    A root is the index of an answer token; a negative one counts back from the prompt's end.
    """
    index = roots[..., None] + torch.arange(1, depth + 1, device=roots.device)
    return index, (index >= 0) & (index < torch.tensor(batch.lengths, device=roots.device)[:, None, None])


def all_roots(batch: TeacherBatch) -> Tensor:
    """Returns the index of every answer token except the last: [B, A]."""
    answers = batch.answers
    return torch.arange(max(batch.lengths) - 1, device=answers.device).expand(len(answers), -1)


def read(values: Tensor, index: Tensor) -> Tensor:
    """Gathers values [B, T, ...] at index [B, A, D], clamped to [0, T-1]: [B, A, D, ...]."""
    at = index.clamp(0, values.shape[1] - 1)
    return pick(values, at.flatten(1)).unflatten(1, at.shape[1:])


def parents(batch: TeacherBatch, index: Tensor) -> Tensor:
    """Returns the tokens [B, A, D] before the answer tokens `index`; the first one follows the prompt's last token."""
    return read(batch.layout.tokens, index + batch.prompt - 1)


def count_chain(batch: TeacherBatch, labels: Tensor, guess: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    """Counts [accepted, drafted] tokens per modality name in chains of guesses [B, A, D] below answer tokens 0 to A-1.

    Tokens below a rejection do not count. The answers must be the target's greedy ones, which accept a draft at
    temperature 0. labels: [B, T] modality ids of the answer tokens.
    """
    A, D = guess.shape[1:]
    index, valid = drafted(batch, torch.arange(A, device=guess.device).expand(len(guess), -1), D)
    correct = guess == read(batch.answers, index)
    reached = torch.cat([torch.ones_like(correct[..., :1]), correct[..., :-1].cumprod(-1).bool()], -1)
    counted, kind = reached & valid, read(labels, index)
    of_kind = {name: counted & (kind == modality.get(name).id) for name in names}
    return {name: [int((correct & mask).sum()), int(mask.sum())] for name, mask in of_kind.items()}


class Objective(nn.Module):
    """A network's published loss, and its acceptance; the batches' logits are log p over its draft vocabulary.

    ends: token ids that end an answer.
    """

    def __init__(self, network: Any, ends: Sequence[int] = ()) -> None:
        super().__init__()
        self.network = network
        self.end_ids = torch.tensor(list(ends), dtype=torch.long)

    def forward(self, batch: TeacherBatch, labels: Tensor, roots: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss and its parts on drafts from the answer tokens `roots` [B, A]; ignores the labels."""
        loss, parts = self.network.loss(batch, roots)
        loss = loss + self.ending_loss(batch, roots)
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    def endings(self, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits that the token after a root is the answer's last, whether it is, and which roots count.

        roots: [B, A]. All are [B, A], the last two bool; a root in the prompt does not count.
        """
        at = roots.clamp_min(0)
        logits = self.network.end_logits(pick(batch.taps, at + batch.prompt - 1), batch.answers.gather(1, at))
        index, valid = drafted(batch, roots, 1)
        valid = valid[..., 0] & (roots >= 0)
        last = torch.isin(read(batch.answers, index)[..., 0], self.end_ids.to(logits.device))
        return logits, last & valid, valid

    def ending_loss(self, batch: TeacherBatch, roots: Tensor) -> Tensor | float:
        """Computes the weighted loss of the ending probe; 0 without one."""
        if self.network.ending is None:
            return 0.0
        logits, last, valid = self.endings(batch, roots)
        each = F.binary_cross_entropy_with_logits(logits.float(), last.float(), reduction="none")
        return ENDING * processes.mean(each, valid, 1)

    @property
    def modalities(self) -> Sequence[str]:
        """Names of the modalities that acceptance is counted for."""
        return [m.name for m in (LANGUAGE, VISION, FUSION)]

    def levels(self, batch: TeacherBatch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (draft logits [B, A, Vd], confidence logits [B, A]) of levels 1 to `depth` below `all_roots`.

        The path to a level is the answer. One level at a time: distributions over a whole vocabulary are large.
        """
        answers, roots = batch.answers, all_roots(batch)
        states = self.network.states(batch, roots, depth)
        for d in range(depth):
            above = answers.gather(1, (roots + d).clamp_max(answers.shape[1] - 1))
            level = states[:, :, d]
            yield self.network.logits(level, above), self.network.confidence_logits(level, above)

    @torch.no_grad()
    def acceptance(self, batch: TeacherBatch, labels: Tensor) -> dict[str, list[int]]:
        """Counts [accepted, drafted] per modality name on top-1 chains from every answer token (see `count_chain`)."""
        levels = self.levels(batch, min(CHAIN, self.network.config.depth))
        guesses = [self.network.ids[logits.argmax(-1)] for logits, _ in levels]
        return count_chain(batch, labels, torch.stack(guesses, -1), self.modalities)

    def reports(self, batches: LabelledBatches) -> dict[str, Any]:
        """Measures or fits on held-out batches, once the network is trained; by default nothing."""
        return {}
