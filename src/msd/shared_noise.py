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

    Memory: 4 V bytes for every unfinished row and every token that it is behind the furthest row.
    """

    def __init__(self, batch: int, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._used = [0] * batch  # draws made by each row
        self._kept: list[dict[int, Tensor]] = []  # by number of the draw: row -> its q [V], until it is used

    def draw(self, p: Tensor, rows: list[int], waiting: list[int]) -> Tensor:
        """The next token of each of `rows` from p [R, V]: [R]. waiting: rows that will draw again, these included.

        RuntimeError, as from `torch.multinomial`, where p is no distribution.
        """
        if not bool((p.amax() < torch.inf) & (p.amin() >= 0)):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        noise = torch.stack([self._next(row, p, waiting) for row in rows])
        return (p / noise).argmax(-1)

    def _next(self, row: int, p: Tensor, waiting: list[int]) -> Tensor:
        """The q [V] of a row's next draw."""
        k = self._used[row]
        self._used[row] = k + 1
        if k == len(self._kept):
            q = p.new_empty(len(self._used), p.shape[1]).exponential_(1, generator=self.generator)
            self._kept.append({other: q[other].clone() for other in waiting if self._used[other] <= k + (other == row)})
        return self._kept[k].pop(row)
