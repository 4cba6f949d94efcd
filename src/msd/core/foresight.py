"""Foresight: the noise of the next draws of a request that samples, which its seed determines.

`torch.multinomial` divides p by exponential noise E and takes the largest quotient (Gumbel-max). The noise does not
depend on p. So a drafter that divides its own q by it drafts the token that the target will draw wherever q is close to
p, as in greedy decoding (a coupling without communication: Daliri, Musco & Suresh 2024, arXiv 2408.07978). The draws
themselves are untouched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outlook:
    """What a drafter knows of the next draws of R rows that sample.

    warp: changes draft logits [R, F, Vd] as the target's logits are changed before a draw (temperature, top-k …).
    noise: [R, levels, V], the noise E of the draws, 1 in rows that do not sample; None where it is unknown.
    """

    warp: Callable[[Tensor], Tensor]
    noise: Tensor | None = None

    def handicaps(self, ids: Tensor) -> tuple[Tensor, ...]:
        """log E of the tokens `ids` [Vd] at each level, [R, 1, Vd]: the argmax of warped logits less these is drawn.

        Empty where the noise is unknown.
        """
        return () if self.noise is None else self.noise[:, :, None, ids].log().unbind(1)


class Foresight:
    """The noise of the next draws from a generator, computed once: `take` gives it to the draw itself."""

    def __init__(self, generator: torch.Generator, vocabulary: int) -> None:
        self.generator, self.vocabulary = generator, vocabulary
        self._known: deque[tuple[Tensor, Tensor]] = deque()  # of each draw: noise [V], the generator's state after it
        self._state, self._ahead = generator.get_state(), generator  # before and after these draws

    def noise(self, draws: int) -> Tensor:
        """The noise of the next draws: [draws, V] float32."""
        self._forget_if_used()
        if not self._known:
            self._state, self._ahead = self.generator.get_state(), self.generator.clone_state()
        while len(self._known) < draws:
            noise = torch.empty(1, self.vocabulary, device=self.generator.device)
            noise.exponential_(1, generator=self._ahead)
            self._known.append((noise[0], self._ahead.get_state()))
        return torch.stack([self._known[draw][0] for draw in range(draws)])

    def take(self) -> Tensor | None:
        """The noise [V] of a draw that happens now, with the generator left as after it; None if it is unknown."""
        self._forget_if_used()
        if not self._known:
            return None
        noise, self._state = self._known.popleft()
        self.generator.set_state(self._state)
        return noise

    def _forget_if_used(self) -> None:
        """Drops what is known if something else has drawn from the generator."""
        if self._known and not torch.equal(self.generator.get_state(), self._state):
            self._known.clear()
