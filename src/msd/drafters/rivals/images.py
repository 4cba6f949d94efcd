"""The images of a batch, taken out of its texts and put back as fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msd.drafters.msd.vision import spans
from msd.drafters.rivals.entries import Columns


@dataclass
class Images:
    """I runs of visual columns, in text order. places: (row, first column, one past the last) of each.

    states: [I, n, H] their embeddings, mask: [I, n] bool, False beyond a run's end.
    """

    places: list[tuple[int, int, int]]
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, c: Columns) -> Images:
        """All of them; none give empty tensors."""
        places = [(row, *span) for row, shown in enumerate(c.visual.tolist()) for span in spans(shown)]
        longest = max((end - first for _, first, end in places), default=1)
        states = c.word.new_zeros(len(places), longest, c.word.shape[-1])
        mask = torch.zeros(len(places), longest, dtype=torch.bool, device=c.word.device)
        for i, (row, first, end) in enumerate(places):
            states[i, : end - first] = c.word[row, first:end]
            mask[i, : end - first] = True
        return cls(places, states, mask)

    def last(self, c: Columns, count: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The last `count[i]` columns of every image: (row, column, which of the image's tokens), each [n] int64.

        There are no more than an image has columns.
        """
        found = [
            (row, end - kept + k, i, k)
            for i, (row, first, end) in enumerate(self.places)
            for kept in [min(count[i], end - first)]
            for k in range(kept)
        ]
        table = torch.tensor(found, dtype=torch.long, device=c.word.device).view(-1, 4)
        return table[:, 0], table[:, 1], table[:, 2:]
