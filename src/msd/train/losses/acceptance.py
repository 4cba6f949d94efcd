"""Losses on acceptance: ‖p − q‖₁ = 2(1 − acceptance rate), and the target's ranking (ViSpec, arXiv 2509.15235)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.drafters.toolkit.context import Selection, pick
from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import Truth
from msd.targets.teacher import Lesson
from msd.train.losses.eagle import eagle_terms
from msd.train.losses.terms import distance, ranking


def vispec_loss(network: DraftNetwork, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
    """Stage 1, text: EAGLE's loss + 0.01 × ranking. Stage 2: 10 × ‖p − q‖₁ + 0.1 × ranking, on the plain pass and
    on one whose features are those that the plain pass drafted.
    """
    assert lesson.taps is not None
    truth = Truth.of(lesson, first, 1, network.config.hidden)
    found = network.select(lesson.layout, lesson.taps[:, :-1], lesson.prompt)
    at = found.slot.gather(1, first + lesson.prompt - 1)
    plain = states_everywhere(network, found, network.noisy(network.feature(found.taps)))
    if bool((lesson.layout.modality == LANGUAGE.id).all()):
        states = pick(plain, at)[:, :, None]
        logits = network.head(states)
        loss, parts = eagle_terms(states, logits, truth)
        return loss + 0.01 * truth.mean(ranking(logits, truth.p)), parts
    drafted = torch.cat([network.feature(found.taps[:, :1]), plain[:, :-1]], 1)
    both = (plain, states_everywhere(network, found, drafted))
    logits = network.head(torch.stack([pick(s, at) for s in both])[..., None, :])
    apart = torch.stack([truth.mean(distance(z, truth.p)) for z in logits]).mean()
    order = torch.stack([truth.mean(ranking(z, truth.p)) for z in logits]).mean()
    return 10 * apart + 0.1 * order, {"distance": apart, "ranking": order}


def states_everywhere(network: DraftNetwork, found: Selection, feature: Tensor) -> Tensor:
    """The states [B, S, H] of all entries with the features [B, S, H]."""
    x = network.enter(found, feature)
    context, visible = network.whole(found, x)
    return network.step(x[:, :, None], found.positions[..., None], context, visible)[0][:, :, 0]
