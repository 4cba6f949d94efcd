"""EAGLE's loss: regression of the target's states and soft cross entropy (arXiv 2401.15077, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.drafters.toolkit.context import Selection, pick
from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import Truth
from msd.targets.teacher import TeacherBatch
from msd.train.losses.terms import distance, ranking, regression, soft_entropy


def eagle_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """SmoothL1 of states + 0.1 × cross entropy, on `network.reach` levels of a draft from each root."""
    states = network.states(batch, first, network.reach)
    return eagle_terms(states, network.head(states), Truth.of(batch, first, network.reach, network.config.hidden))


def eagle_terms(states: Tensor, logits: Tensor, truth: Truth) -> tuple[Tensor, Parts]:
    """The same of states [B, A, D, H] with their logits [B, A, D, V]."""
    feature, entropy = truth.mean(regression(states, truth.state)), truth.mean(soft_entropy(logits, truth.p))
    return feature + 0.1 * entropy, {"regression": feature, "entropy": entropy}


def distillation_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """Cross entropy to the target's distribution alone, as a language model is distilled."""
    truth = Truth.of(batch, first, 1, network.config.hidden)
    loss = truth.mean(soft_entropy(network.logits(network.states(batch, first, 1), truth.token), truth.p))
    return loss, {"entropy": loss}


def vispec_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """Stage 1, text: EAGLE's loss + 0.01 × ranking. Stage 2: 10 × ‖p − q‖₁ + 0.1 × ranking, on the plain pass and
    on one whose features are those that the plain pass drafted.
    """
    assert batch.taps is not None
    truth = Truth.of(batch, first, 1, network.config.hidden)
    found = network.select(batch.layout, batch.taps[:, :-1], batch.prompt)
    at = found.slot.gather(1, first + batch.prompt - 1)
    plain = states_everywhere(network, found, network.noisy(network.feature(found.taps)))
    if bool((batch.layout.modality == LANGUAGE.id).all()):
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


DECAY = 0.8  # of a level's weight


def training_time_test_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """Cross entropy to the target's distribution within the draft vocabulary; level i of `reach` weighs 0.8^i.

    A position counts where the target's choice is in the vocabulary: the answer's token, answers being greedy.
    """
    reach = network.reach
    truth = Truth.of(batch, first, reach, network.config.hidden)
    logits = network.logits(network.states(batch, first, reach), truth.token)
    entropy = soft_entropy(logits, truth.p / truth.p.sum(-1, keepdim=True).clamp_min(1e-9))
    counts = (truth.valid & torch.isin(truth.token, network.ids)).to(entropy.dtype)
    each = (entropy * counts).sum((0, 1)) / counts.sum((0, 1)).clamp_min(1)
    loss = (each * DECAY ** torch.arange(reach, device=each.device)).sum()
    return loss, {"first": each[0], "last": each[-1]}
