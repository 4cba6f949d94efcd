"""The protocol that every drafter follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.events.recording import Events
from msd.planning.plan import Budget
from msd.targets.state import State


class Drafter(Protocol):
    """Proposes trees below the newest token. Holds no request's data: what it remembers lives in `State.memory`.

    name: the method's name in tables. taps: hidden-state indices it needs from the target (see `msd.targets.taps`).
    sampled: whether it draws its candidates, in which case sampling is exact in distribution but not seed for seed.
    """

    name: str
    taps: tuple[int, ...]
    sampled: bool

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Called once, when the drafter meets its target; UserError when the two do not fit.

        backend: the name of the one that computes the target's passes, which the drafter may follow.
        """
        ...

    def twin(self, model: PreTrainedModel) -> Drafter:
        """A drafter of the same kind for another, tiny model, any weights will do: its sampling is tested there."""
        ...

    def begin(self, state: State, scores: Scores) -> None:
        """Called once, after prefill and the first emitted token; `scores` are those of the prompt.

        It only notes them. What costs a pass is done by the first `propose` that may draft: an answer that is over
        before that, or a governor that lets nothing be drafted, pays nothing.
        """
        ...

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """A tree per row within the budget; node 0 is `state.layout.newest()`.

        A drafter that samples its candidates draws them with `sampler.multinomial`, so that the request's seed decides.
        """
        ...

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """[B, N] class predicted for the token below each scored node, from the target's states; None: no router.

        Called between scoring and accepting when the verification policy asks for it. It reads no prompt.
        """
        ...

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Called after each step with what was accepted, before the next `propose`."""
        ...


@runtime_checkable
class Translates(Protocol):
    """A drafter with a vocabulary of its own."""

    def translate(self, tokenizer: Any) -> None:
        """Called before `attach` with the target's tokenizer, if there is one; UserError where the two do not fit."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A drafter that comes with thresholds for the `budget` policy."""

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """Modality name -> θ for a budget of ε; empty when none is known."""
        ...


@runtime_checkable
class BorrowsEye(Protocol):
    """A drafter that looks at event recordings with the target's own eye."""

    def borrow(self, look: Callable[[Events], Tensor]) -> None:
        """Called before `attach`, if the target has a processor; `look` gives [E, H] tokens (see `recordings`)."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A drafter that reads prompts by itself, without the target's states."""

    def ahead(self, layout: Layout, beside: Tensor | None) -> Any:
        """What it makes of a prompt [B, L] (`layout.end` is L in every row): `State.memory` when `begin` is called.

        Runs in a thread of its own while the target prefills the same prompt; the layout is the drafter's alone.
        beside: [B, E, H], see `State`.
        """
        ...
