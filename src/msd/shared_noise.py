"""SharedNoise: the draws that `generate()` makes for a batch with one generator, for rows that are at different tokens.

`torch.multinomial` draws one token from p by argmax(p / q) with q ~ Exp(1) (the Gumbel-max trick), and `generate()`
asks it once a step for all B rows. So the k-th token of row b depends on row b of the k-th q alone. Speculative
decoding lets rows run ahead of each other: each q is made when the first row needs it, and the part of a row is kept
until that row has used it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SharedNoise:
    """generator: of the whole batch of B rows; None: torch's global one.

    Memory: at most 8 V bytes for every unfinished row and every token that it is behind the furthest row.
    """

    def __init__(self, batch: int, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._used = [0] * batch  # draws made by each row
        self._kept: dict[int, _Noise] = {}  # by number of the draw

    def draw(self, p: Tensor, rows: list[int], waiting: list[int]) -> Tensor:
        """The next token of each of `rows` from p [R, V]: [R]. waiting: rows that draw now or later, these included.

        RuntimeError, as from `torch.multinomial`, where p is no distribution.
        """
        if not bool((p.amax() < torch.inf) & (p.amin() >= 0)):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        members: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(self._used[row], []).append(i)
            self._used[row] += 1
        noise = torch.empty_like(p)
        for k, some in sorted(members.items()):
            if k not in self._kept:
                q = p.new_empty(len(self._used), p.shape[1]).exponential_(1, generator=self.generator)
                self._kept[k] = _Noise(q, list(range(len(q))))
            noise[some] = self._kept[k].of([rows[i] for i in some])
        last = min(self._used[row] for row in waiting)
        for k in list(self._kept):
            if k < last:
                del self._kept[k]
            else:
                self._kept[k].keep([row for row in waiting if self._used[row] <= k])
        return (p / noise).argmax(-1)


class _Noise:
    """One q, of those rows that have yet to use it: noise [R, V] of `rows`."""

    def __init__(self, noise: Tensor, rows: list[int]) -> None:
        self.noise, self.rows = noise, rows

    def of(self, rows: list[int]) -> Tensor:
        """Their parts, in that order."""
        if rows == self.rows:
            return self.noise
        place = {row: i for i, row in enumerate(self.rows)}
        return self.noise[[place[row] for row in rows]]

    def keep(self, rows: list[int]) -> None:
        """Lets go of all others once they are half of what is held."""
        if 2 * len(rows) <= len(self.rows):
            self.noise, self.rows = self.of(rows).clone(), rows
