"""The protocol of a drafter, and the optional protocols that a drafter may implement as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State


class Drafter(Protocol):
    """Proposes trees below the newest token. All data of a request lives in `State.memory`, none in the drafter.

    A subclass inherits methods that do nothing, except `twin` and `propose`.

    name: the method's name in tables. taps: indices of the target's hidden states that it reads (`msd.targets.taps`).
    sampled: whether it samples its candidates. Sampled output is then exact in distribution, but differs from
    `generate()` with the same seed.
    """

    name: str
    taps: tuple[int, ...] = ()
    sampled: bool = False

    @property
    def joinable(self) -> bool:
        """Whether `select` and `join` are implemented; by default they are not."""
        return False

    def translate(self, tokenizer: Any) -> None:
        """Maps the target's vocabulary to the drafter's own; UserError if they do not fit. Called before `attach`."""
        return

    def share_vision_tower(self, encode: Callable[[list[Image.Image]], Tensor]) -> None:
        """Receives a function that encodes F pictures as tokens [E, H] with the target's vision tower.

        Called before `attach` if the target has a processor; see `msd.drafters.auxiliary.picture_tokens`.
        """
        return

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """Maps modality names to the θ that the `budget` policy starts with for a budget of ε; empty by default."""
        return {}

    def fit(self, layers: int) -> None:
        """Learns the number of the target's layers, before `taps` is read."""
        return

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Binds the drafter to its target; UserError when the two do not fit. Called again when embeddings change.

        backend: the name of the backend that computes the target's passes; the drafter may use the same one.
        """
        return

    def twin(self, model: PreTrainedModel) -> Drafter:
        """Returns a drafter of the same kind with any weights for a tiny model, on which its sampling is tested."""

    def begin(self, state: State, scores: Scores) -> None:
        """Stores the `scores` of the prompt. Called once, after prefill and the first emitted token.

        It runs no pass. The first `propose` that may draft reads the prompt, so a request that ends before, or one
        whose governor allows no drafts, costs nothing.
        """
        return

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Returns a tree for each row, within the budget; node 0 is `state.layout.newest()`.

        A drafter that samples its candidates draws them with `sampler.multinomial`, which uses the request's seed.
        """

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """Predicts the class [B, N] of the token below each scored node from the target's states; None: no router.

        Called between scoring and accepting, if the verifier needs it. It does not read the prompt.
        """
        return None

    def remember(self, model: PreTrainedModel) -> None:
        """Improves the drafts of later requests by what the target accepts, and keeps what it learns between runs.

        Called after `attach`, only where drafts cannot change answers.
        """
        return

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Receives what a step accepted. Called after each step, before the next `propose`."""
        return

    def finish(self) -> None:
        """Called after the last step of a request that was not interrupted."""
        return

    def select(self, state: State, rows: list[int]) -> None:
        """Drops all other rows from the memory; `rows` become rows 0, 1, … Called before the state's own `select`."""
        raise UserError(f"method '{self.name}' cannot change the rows of a running batch")

    def join(self, state: State, other: State) -> None:
        """Appends the memory of `other`, which has begun too, to that of `state`. Called before the state's `join`."""
        raise UserError(f"method '{self.name}' cannot change the rows of a running batch")


@runtime_checkable
class ReadsAuxiliary(Protocol):
    """A drafter that reads auxiliary tokens: an encoded input that the target does not see.

    auxiliary_source: the name of the source (`msd.drafters.auxiliary`) that it reads; None if it reads none.
    """

    auxiliary_source: str | None

    def encode(self, item: Any) -> Tensor:
        """Encodes one opened input of the source as tokens [E, H]. E is fixed; the tokens are never all zero."""


@runtime_checkable
class ReadsPrompt(Protocol):
    """A drafter that reads prompts without the target's hidden states, so it can read one while the target prefills."""

    def read_prompt(self, layout: Layout, auxiliary: Tensor | None) -> Any:
        """Reads a prompt [B, L] (`layout.end` is L in every row); the result is `State.memory` when `begin` is called.

        Runs in its own thread. No other code uses this layout. auxiliary: [B, E, H], see `State`.
        """
