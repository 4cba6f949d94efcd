"""JoinedSampler: one batch whose rows belong to independent requests, which may join and leave between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.foresight import Outlook
from msd.core.layout import Layout
from msd.core.sampling import Sampler, argmax


class JoinedSampler(Sampler):
    """The samplers of requests of one row each. Row r draws, stops and is processed as `parts[r]` does alone.

    layout: of the whole batch. A part's own layout is its row of it: both share their tensors.
    """

    def __init__(self, layout: Layout, part: Sampler) -> None:
        self.layout, self.parts = layout, [part]
        self.vocabulary, self.lockstep, self.noise = part.vocabulary, False, None
        self._bind()

    def join(self, part: Sampler) -> None:
        """Appends the sampler of the row that has been appended to the layout."""
        self.parts.append(part)
        self._bind()

    def select(self, rows: list[int]) -> None:
        """Keeps the parts of `rows`, after the layout has done so."""
        self.parts = [self.parts[row] for row in rows]
        self._bind()

    def _bind(self) -> None:
        """Gives every part its row of the layout."""
        for row, part in enumerate(self.parts):
            part.layout = self.layout.row(row)
        self.finish = [part.finish[0] for part in self.parts]
        self.keep_logits = any(part.keep_logits for part in self.parts)
        if self.parts:
            self.do_sample = any(part.do_sample for part in self.parts)

    def end(self, row: int, reason: str) -> None:
        """Stops a row before its next step, for a reason of the caller."""
        self.finish[row] = self.parts[row].finish[0] = reason

    def tokens_left(self, row: int) -> int:
        """See `Sampler`."""
        return self.parts[row].tokens_left(0)

    def may_draft(self, row: int) -> bool:
        """See `Sampler`."""
        return self.parts[row].drafts

    def logits(self, raw: Tensor, rows: list[int]) -> Tensor:
        """See `Sampler`."""
        if not any(self.parts[row].processors for row in rows):
            return raw.to(copy=True, dtype=torch.float32)
        return torch.cat([self.parts[row].logits(raw[i, None], [0]) for i, row in enumerate(rows)])

    def draw(self, logits: Tensor, rows: list[int]) -> Tensor:
        """See `Sampler`."""
        token = argmax(logits)
        for i, row in enumerate(rows):
            if self.parts[row].do_sample:
                token[i] = self.parts[row].draw(logits[i, None], [0])[0]
        return token

    def multinomial(self, p: Tensor, rows: list[int]) -> Tensor:
        """See `Sampler`."""
        return torch.cat([self.parts[row].multinomial(p[i, None], [0]) for i, row in enumerate(rows)])

    def outlook(self, rows: list[int], levels: int) -> Outlook | None:
        """See `Sampler`; greedy rows have no noise."""
        found = [self.parts[row].outlook([0], levels) for row in rows]
        if not any(found):
            return None

        def warp(drafted: Tensor) -> Tensor:
            each = zip(found, drafted.split(1), strict=True)
            return torch.cat([logits if outlook is None else outlook.warp(logits) for outlook, logits in each])

        greedy = torch.ones(1, levels, self.vocabulary, device=self.layout.tokens.device)
        noise = [greedy if outlook is None else outlook.noise for outlook in found]
        known = [each for each in noise if each is not None]
        return Outlook(warp, torch.cat(known) if len(known) == len(noise) else None)

    def uniform(self, rows: list[int], device: torch.device) -> Tensor:
        """See `Sampler`."""
        return torch.cat([self.parts[row].uniform([0], device) for row in rows])

    @property
    def reads_logits_only(self) -> bool:
        """See `Sampler`; of all rows that are in the next step."""
        return all(self.parts[row].reads_logits_only for row in self.alive)

    def emit_path(self, row: int, tokens: list[int]) -> int:
        """See `Sampler`."""
        count = self.parts[row].emit_path(0, tokens)
        self._read(row)
        return count

    def emit_all(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """See `Sampler`."""
        alive = []
        for row, token in zip(rows, tokens, strict=True):
            alive += self.parts[row].emit_all([0], [token])
            self._read(row)
        return alive

    def _read(self, row: int) -> None:
        """Reads from its part where a row ends, and whether it has finished."""
        part = self.parts[row]
        self.layout.end[row], self.finish[row] = part.layout.end[0], part.finish[0]
