"""Packs several samples into one row. A sample has a shared prefix (with or without pictures) and question branches.

A branch attends to the prefix of its sample and to itself; its positions continue from the prefix. So a picture is
computed once for all questions about it, and only the end of a row is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CELLS = 64
IMAGE = -1  # placeholder of an image token in a sample's prefix


@dataclass(frozen=True)
class Branch:
    """One question (ids, with the start of the assistant's turn) and its answer (ids, with the end token if complete).

    With an empty question, the answer belongs to the question at the end of the sample's prefix. The answer of an
    `avoid` branch is trained against.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]
    task: str
    weight: float = 1.0
    avoid: bool = False

    def __len__(self) -> int:
        return len(self.question) + len(self.answer)


@dataclass(frozen=True)
class Sample:
    """A prefix shared by branches. pictures: (feature set, row) of each. blind: text does not see image tokens."""

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]
    pictures: tuple[tuple[str, int], ...] = ()
    blind: bool = False

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass
class Batch:
    """Packed samples. Rows B of L tokens; T answer tokens; N pictures of 64 tokens."""

    ids: Tensor  # [B, L] int64
    positions: Tensor  # [B, L] int64
    sample: Tensor  # [B, L] int64, which sample; -1 is padding
    branch: Tensor  # [B, L] int64, 0 is the prefix
    is_image: Tensor  # [B, L] bool
    blind: Tensor  # [B, L] bool, the sample's text does not attend to its pictures
    features: Tensor  # [N, 64, 1328]
    rows: Tensor  # [T] position that predicts an answer token
    columns: Tensor  # [T]
    targets: Tensor  # [T] the token predicted there
    weights: Tensor  # [T] float32
    avoid: Tensor  # [T] bool
    tasks: list[str] = field(default_factory=list)  # [T]
    pictures: list[tuple[str, int]] = field(default_factory=list)  # their feature rows, in order

    def mask(self) -> Tensor:
        """Returns the attention mask [B, 1, L, L] bool."""
        s, b = self.sample, self.branch
        seen = (s[:, :, None] == s[:, None, :]) & ((b[:, :, None] == b[:, None, :]) | (b[:, None, :] == 0))
        hidden = (self.blind & ~self.is_image)[:, :, None] & self.is_image[:, None, :]
        L = s.shape[1]
        causal = torch.ones(L, L, dtype=torch.bool, device=s.device).tril()
        return (seen & ~hidden & causal)[:, None] | torch.eye(L, dtype=torch.bool, device=s.device)

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def place(samples: Sequence[Sample], rows: int, length: int, whole_first: bool = False) -> list[list[Sample]]:
    """Distributes samples over rows of `length`, longest first; one that does not fit loses branches or is left out.

    whole_first: clips and samples with few branches come first, and samples with a shared question last, so that
    samples with many branches lose some. Longest first leaves out short samples (a third of the COCO photos, half of
    the text turns).
    """

    def rank(sample: Sample) -> tuple[int, int, int]:
        cuttable = len(sample.branches) if whole_first and len(sample.pictures) <= 1 else 0
        cuttable += 100 * all(not b.question for b in sample.branches)
        return cuttable, -len(sample.pictures) if whole_first else 0, -len(sample)

    placed: list[list[Sample]] = [[] for _ in range(rows)]
    room = [length] * rows
    for sample in sorted(samples, key=rank):
        kept: Sample | None = sample
        while kept and len(kept) > max(room):
            kept = replace(kept, branches=kept.branches[:-1]) if len(kept.branches) > 1 else None
        if kept:
            row = min((r for r in range(rows) if room[r] >= len(kept)), key=lambda r: room[r])
            placed[row].append(kept)
            room[row] -= len(kept)
    return placed


def pack(placed: Sequence[Sequence[Sample]], length: int, pad: int) -> Batch:
    """Converts rows of samples to tensors. `features` stays empty; `pictures` lists the rows to fill in."""
    B = len(placed)
    ids = torch.full((B, length), pad)
    positions, branch = torch.zeros(B, length, dtype=torch.long), torch.zeros(B, length, dtype=torch.long)
    sample = torch.full((B, length), -1)
    is_image, blind = torch.zeros(B, length, dtype=torch.bool), torch.zeros(B, length, dtype=torch.bool)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    avoid: list[bool] = []
    tasks: list[str] = []
    pictures: list[tuple[str, int]] = []
    for r, row in enumerate(placed):
        at = 0
        for s, item in enumerate(row):
            n, start = len(item.prefix), at
            prefix = torch.tensor(item.prefix, dtype=torch.long)
            ids[r, at : at + n] = prefix.clamp(min=0)
            is_image[r, at : at + n] = prefix == IMAGE
            positions[r, at : at + n] = torch.arange(n)
            pictures.extend(item.pictures)
            at += n
            for k, b in enumerate(item.branches, 1):
                m = len(b)
                ids[r, at : at + m] = torch.tensor(b.question + b.answer)
                positions[r, at : at + m] = torch.arange(n, n + m)
                branch[r, at : at + m] = k
                first = at + len(b.question)
                rows += [r] * len(b.answer)
                columns += [first - 1 if b.question else start + n - 1, *range(first, first + len(b.answer) - 1)]
                targets += b.answer
                weights += [b.weight] * len(b.answer)
                avoid += [b.avoid] * len(b.answer)
                tasks += [b.task] * len(b.answer)
                at += m
            sample[r, start:at], blind[r, start:at] = s, item.blind
    t = lambda v: torch.tensor(v, dtype=torch.long)  # noqa: E731
    return Batch(
        ids, positions, sample, branch, is_image, blind, torch.zeros(0, CELLS, 1328), t(rows), t(columns), t(targets),
        torch.tensor(weights), torch.tensor(avoid, dtype=torch.bool), tasks, pictures,
    )  # fmt: skip
