"""The losses of published methods: EAGLE's and those that build on it, then those of block drafters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.drafters.toolkit import processes
from msd.drafters.toolkit.context import Selection, pick
from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import TargetOutputs, parents
from msd.targets.teacher import TeacherBatch
from msd.train.losses.terms import distance, hard_entropy, ranking, regression, soft_entropy

DECAY = 0.8  # of the weight of a level in EAGLE-3's loss
BLOCK_DECAY = 4.0  # position k weighs exp(-k/4), as released for blocks of 7


def eagle_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes SmoothL1 of states + 0.1 × cross entropy on `network.reach` levels (2401.15077, section 3.2)."""
    states = network.states(batch, roots, network.reach)
    target = TargetOutputs.of(batch, roots, network.reach, network.config.hidden)
    return eagle_terms(states, network.head(states), target)


def eagle_terms(states: Tensor, logits: Tensor, target: TargetOutputs) -> tuple[Tensor, Parts]:
    """Computes EAGLE's loss from states [B, A, D, H] and their logits [B, A, D, V]."""
    feature, entropy = target.mean(regression(states, target.state)), target.mean(soft_entropy(logits, target.p))
    return feature + 0.1 * entropy, {"regression": feature, "entropy": entropy}


def distillation_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes the cross entropy to the target's distribution, as in distilling a language model."""
    target = TargetOutputs.of(batch, roots, 1, network.config.hidden)
    loss = target.mean(soft_entropy(network.logits(network.states(batch, roots, 1), target.token), target.p))
    return loss, {"entropy": loss}


def vispec_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes ViSpec's loss (arXiv 2509.15235, section 3.3).

    Stage 1, text: EAGLE's loss + 0.01 × ranking. Stage 2: 10 × ‖p − q‖₁ + 0.1 × ranking, averaged over a pass on the
    target's features and a pass on the features that the first pass drafted.
    """
    target = TargetOutputs.of(batch, roots, 1, network.config.hidden)
    selection = network.select(batch.layout, batch.taps[:, :-1], batch.prompt)
    at = selection.slot.gather(1, roots + batch.prompt - 1)
    plain = states_everywhere(network, selection, network.noisy(network.feature(selection.taps)))
    if bool((batch.layout.modality == LANGUAGE.id).all()):
        states = pick(plain, at)[:, :, None]
        logits = network.head(states)
        loss, parts = eagle_terms(states, logits, target)
        return loss + 0.01 * target.mean(ranking(logits, target.p)), parts
    drafted = torch.cat([network.feature(selection.taps[:, :1]), plain[:, :-1]], 1)
    both = (plain, states_everywhere(network, selection, drafted))
    logits = network.head(torch.stack([pick(s, at) for s in both])[..., None, :])
    l1, order = (torch.stack([target.mean(f(z, target.p)) for z in logits]).mean() for f in (distance, ranking))
    return 10 * l1 + 0.1 * order, {"distance": l1, "ranking": order}


def states_everywhere(network: DraftNetwork, selection: Selection, feature: Tensor) -> Tensor:
    """Computes the states [B, S, H] of all entries from features [B, S, H]."""
    x = network.enter(selection, feature)
    context, visible = network.full_context(selection, x)
    return network.run_layers(x[:, :, None], selection.positions[..., None], context, visible)[0][:, :, 0]


def training_time_test_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes EAGLE-3's loss: cross entropy to p within the draft vocabulary, level i of `reach` weighing 0.8^i.

    A position counts only if the target's choice, the token of the greedy answer, is in the vocabulary.
    """
    reach = network.reach
    target = TargetOutputs.of(batch, roots, reach, network.config.hidden)
    logits = network.logits(network.states(batch, roots, reach), target.token)
    entropy = soft_entropy(logits, target.p / target.p.sum(-1, keepdim=True).clamp_min(1e-9))
    counts = (target.valid & torch.isin(target.token, network.ids)).to(entropy.dtype)
    each = processes.ratio((entropy * counts).sum((0, 1)), counts.sum((0, 1)), 1)
    loss = (each * DECAY ** torch.arange(reach, device=each.device)).sum()
    return loss, {"first": each[0], "last": each[-1]}


def _weights(depth: int, device: torch.device) -> Tensor:
    return torch.exp(-torch.arange(depth, device=device) / BLOCK_DECAY)


def dflash_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes the cross entropy to the answer's tokens, with weights exp(−k/4)."""
    D = network.config.depth
    target = TargetOutputs.of(batch, roots, D, network.config.hidden)
    logits = network.head(network.states(batch, roots, D))
    loss = target.mean(hard_entropy(logits, target.token), _weights(D, roots.device))
    return loss, {"entropy": loss}


def dspark_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes 0.9 × ‖p − q‖₁ + 0.1 × cross entropy to the answer + that of the confidence, with weights exp(−k/4)."""
    D = network.config.depth
    target = TargetOutputs.of(batch, roots, D, network.config.hidden)
    states = network.states(batch, roots, D)
    above = parents(batch, roots[..., None] + torch.arange(1, D + 1, device=roots.device))
    logits, confidence = network.logits(states, above), network.confidence_logits(states, above)
    l1 = distance(logits, target.p)
    overlap = (1 - l1.detach() / 2).clamp(0, 1)
    terms = {
        "distance": l1,
        "entropy": hard_entropy(logits, target.token),
        "confidence": F.binary_cross_entropy_with_logits(confidence.float(), overlap, reduction="none"),
    }
    parts = {name: target.mean(term, _weights(D, roots.device)) for name, term in terms.items()}
    return 0.9 * parts["distance"] + 0.1 * parts["entropy"] + parts["confidence"], parts
