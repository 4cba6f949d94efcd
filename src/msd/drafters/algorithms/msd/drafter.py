"""`msd`: modality-aware draft trees (docs/drafter.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores
from msd.drafters import auxiliary
from msd.drafters.algorithms.msd.config import MSDConfig
from msd.drafters.algorithms.msd.network import MSDNetwork
from msd.drafters.toolkit.chains import draw
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.drafters.toolkit.growth import Subtrees
from msd.planning.plan import Budget
from msd.targets.state import State


class MSD(TrainedDrafter):
    """Drafts with an MSD network, and has the thresholds that were calibrated for it.

    sampled: whether it draws candidates from the draft distributions instead of ranking them. separate: whether each
    likely modality has a subtree, by default only for sampled candidates; otherwise there is one tree, which is as fast
    and simpler (docs/trees.md). With experts it follows the router's mixture.
    """

    network: MSDNetwork
    source: ClassVar[str] = "events"  # of the auxiliary tokens that networks are trained with

    def __init__(
        self, network: MSDNetwork, name: str | None = None, sampled: bool = False, separate: bool | None = None
    ) -> None:
        super().__init__(network, name)
        self.sampled, self.separate = sampled, sampled if separate is None else separate
        # str(ε) -> modality name -> θ, initial thresholds of the `budget` policy
        self.calibrated: dict[str, dict[str, float]] = network.provenance.get("thresholds") or {}
        self.modality_ids = network.config.modality_ids
        self.auxiliary_source: str | None = None

    def share_vision_tower(self, encode: Callable[[list[Image.Image]], Tensor]) -> None:
        """See `Drafter`; ignored by a network that was trained without auxiliary tokens."""
        if self.network.auxiliary_adaptor is not None:
            self.auxiliary_source, self._encode = self.source, encode

    def encode(self, item: Any) -> Tensor:
        """Encodes `FRAMES` frames of an auxiliary input with the target's vision tower; see `ReadsAuxiliary`.

        A network that was trained with its motion also gets that.
        """
        return auxiliary.tokens(auxiliary.get(self.source), item, self._encode, self.network.config.motion)

    def twin(self, model: PreTrainedModel) -> MSD:
        """See `Drafter`; the twin has the same form and switches, and drafts the model's whole vocabulary."""
        return MSD(
            self.network.twin(model.config.get_text_config(decoder=True)), self.name, self.sampled, self.separate
        )

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """Returns the θ calibrated for the largest known budget within ε; empty if there is none."""
        within = [known for known in self.calibrated if float(known) <= epsilon]
        return self.calibrated[max(within, key=float)] if within else {}

    def draft(self, state: State, rows: list[int], budget: Budget, sampler: Sampler) -> DraftTree:
        """Grows the subtrees of the active modalities and merges them, or draws chains from their distributions."""
        if not (self.sampled and sampler.do_sample):
            return super().draft(state, rows, budget, sampler)
        newest, config = state.layout.newest(), self.network.config
        memory = state.memory.read(self.network, state.layout)
        levels = self.network.levels(memory.anchors(), newest)
        subtrees = self.choose(self.network.routed(memory.anchor), budget)
        shape = config.within(config.shared)
        return draw(levels, self.network, subtrees, self.modality_ids, newest, budget, sampler, shape)

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """See `TrainedDrafter`; one for each active modality."""
        memory = state.memory.read(self.network, state.layout)
        return self.choose(self.network.routed(memory.anchor)[rows], budget)

    def choose(self, route: Tensor, budget: Budget) -> Subtrees:
        """See `choose_subtrees`; route: [R, experts]."""
        return choose_subtrees(self.network.config, route, budget.width, self.separate)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `Drafter`; it does not read the prompt, so an answer that ends before any draft costs nothing."""
        if self.network.router is None or scores.taps is None:
            return None
        return self.network.classes(tree, scores.taps, self.network.feature(state.memory.newest()[:, None]))


def choose_subtrees(config: MSDConfig, route: Tensor, width: int | None = None, separate: bool = True) -> Subtrees:
    """Chooses the subtrees from router probabilities [B, experts], their shares (dynamic subtree selection).

    A row has a modality's subtree if its probability reaches `active_from`, or is the row's largest. Without subtrees,
    not `separate`, or for a chain (`width` 1), one subtree follows the router's mixture.
    """
    B, M = route.shape
    if not (config.subtrees and separate) or width == 1:
        return Subtrees(route[:, None], torch.ones_like(route[:, :1]), [config.within(config.shared, width)])
    if config.dynamic:
        route = route * (route >= route.amax(-1, keepdim=True).clamp_max(config.active_from))
    weights = torch.eye(M, device=route.device, dtype=route.dtype).expand(B, -1, -1)
    return Subtrees(weights, route, [config.within(config.shapes[m], width) for m in config.modalities])
