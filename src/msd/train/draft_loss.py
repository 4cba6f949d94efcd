"""What a draft network is trained for: laws that meet the target's, weighed by modality.

L = L_vision + λ_text·L_text + λ_fusion·L_fusion. A class's term is the mean over its drafted positions of
regression (SmoothL1 of the trunk's state to the target's last hidden state), ‖p − q‖₁ = 2(1 − acceptance) over the
draft vocabulary (ViSpec, arXiv 2509.15235, section 3.3) and cross entropy to p; positions deeper in a draft count
less. Router, ending and confidence have terms of their own that move nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd import modality
from msd.drafters.msd.context import entries, pick
from msd.drafters.msd.network import Anchors, MSDNetwork
from msd.errors import UserError
from msd.targets.teacher import Lesson

WEIGHTINGS = ("learned", "fixed", "threshold")


@dataclass(frozen=True)
class LossConfig:
    """Weights of a term's parts; `decay` per draft depth; how λ comes about (see `TaskWeights`)."""

    regression: float = 0.2
    overlap: float = 0.6
    entropy: float = 0.4
    router: float = 0.2
    ending: float = 0.2
    confidence: float = 0.1
    decay: float = 0.8
    weighting: str = "learned"


class TaskWeights(nn.Module):
    """λ of every modality relative to vision, whose weight is 1 (to the first one where there is no vision).

    learned: homoscedastic uncertainty (Kendall et al. 2018): a weight exp(-s) with penalty s for each class, and
    λ = their ratio, kept within [1/2, 2]: without bounds it drifts to the inverse ratio of the losses and favours
    whatever is easiest. fixed: 1. threshold: the registry's θ.
    """

    def __init__(self, modalities: tuple[str, ...], weighting: str) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise UserError(f"loss weighting '{weighting}' is unknown; choose one of {', '.join(WEIGHTINGS)}")
        self.names, self.weighting = modalities, weighting
        self.reference = modalities.index("vision") if "vision" in modalities else 0
        self.s = nn.Parameter(torch.zeros(len(modalities)), requires_grad=weighting == "learned")

    def values(self) -> Tensor:
        """λ [M], in the order of the modalities."""
        if self.weighting == "threshold":
            table = [modality.get(name).threshold for name in self.names]
            table[self.reference] = 1.0
            return self.s.new_tensor(table)
        return torch.exp(self.s.detach()[self.reference] - self.s.detach()).clamp(0.5, 2.0)

    def forward(self, terms: Tensor, present: Tensor) -> Tensor:
        """Terms [M], present [M] bool (classes that occur) -> Σ λ·term, and what moves s alone."""
        loss = (self.values() * terms * present).sum()
        if self.weighting == "learned":
            own = ((torch.exp(-self.s) * terms.detach() + self.s) * present).sum()
            loss = loss + own - own.detach()
        return loss


def position_losses(
    log_q: Tensor, p: Tensor, state: Tensor, truth: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Loss [...] of drafted positions, and how much of the target's law the draft law meets there, Σ min(p, q) [...].

    log_q, p: [..., Vd] over the draft vocabulary, p summing to at most 1 (the rest is out of reach). state, truth:
    [..., H], the draft state and the target's last hidden state.
    """
    l1 = (p - log_q.exp()).abs().sum(-1) + (1 - p.sum(-1)).clamp_min(0)  # ‖p − q‖₁ over all tokens
    entropy = -(p * log_q).sum(-1)
    regression = F.smooth_l1_loss(state.float(), truth.float(), reduction="none").mean(-1)
    loss = config.regression * regression + config.overlap * l1 + config.entropy * entropy
    return loss, (1 - l1.detach() / 2).clamp(0, 1)


def msd_draft_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    draft_states: Tensor,
    target_states: Tensor,
    modalities: Tensor,
    weights: TaskWeights,
    config: LossConfig | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """L = Σ λ_m·L_m over plain tensors: (loss, its terms by modality).

    draft_logits, target_logits: [N, V]. draft_states, target_states: [N, H]. modalities: [N] registry ids. UserError
    when the shapes do not fit.
    """
    n = len(modalities)
    if draft_logits.shape != target_logits.shape or len(draft_logits) != n or draft_states.shape != target_states.shape:
        shapes = [list(t.shape) for t in (draft_logits, target_logits, draft_states, target_states)]
        raise UserError(f"{n} modalities need draft and target logits [{n}, V] and states [{n}, H], got {shapes}")
    each, _ = position_losses(
        draft_logits.float().log_softmax(-1), target_logits.float().softmax(-1), draft_states, target_states,
        config or LossConfig(),
    )  # fmt: skip
    ids = torch.tensor([modality.get(name).id for name in weights.names], device=modalities.device)
    kind = (modalities[:, None] == ids).to(each.dtype)
    count = kind.sum(0)
    terms = (each[:, None] * kind).sum(0) / count.clamp_min(1)
    loss = weights(terms, count > 0)
    return loss, {name: float(t) for name, t in zip(weights.names, terms.detach(), strict=True)}


@dataclass
class Drafts:
    """A anchors per row with D drafted positions each.

    anchors: what the network drafts from. index: [B, A, D] which answer token is drafted. valid: [B, A, D] bool.
    """

    anchors: Anchors
    index: Tensor
    valid: Tensor

    def read(self, values: Tensor) -> Tensor:
        """Values of the answer tokens [B, T, ...] at the drafted positions: [B, A, D, ...]; any at invalid ones."""
        return _read(values, self.index)


def _read(values: Tensor, index: Tensor) -> Tensor:
    """values [B, T, ...] at index [B, A, D], beyond the end the last: [B, A, D, ...]."""
    at = index.clamp_max(values.shape[1] - 1)
    return pick(values, at.flatten(1)).unflatten(1, at.shape[1:])


class DraftObjective(nn.Module):
    """The loss of a draft network on lessons of its target, whose logits are log p over the draft vocabulary.

    ends: ids of the tokens that end an answer.
    """

    def __init__(
        self, network: MSDNetwork, config: LossConfig, depth: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.depth = depth or network.config.depth
        self.weights = TaskWeights(network.config.modalities, config.weighting)
        self.kinds = torch.tensor(network.config.modality_ids)
        self.end_ids = torch.tensor(list(ends), dtype=torch.long)

    def states(self, lesson: Lesson, first: Tensor) -> tuple[Drafts, Tensor]:
        """Trunk states [B, A, D, H] when the roots are the answer tokens `first` [B, A], deeper words as written."""
        assert lesson.taps is not None
        network, D = self.network, self.depth
        found = entries(network, lesson.layout, lesson.taps[:, :-1], lesson.beside)
        anchors = found.anchors(first + lesson.prompt - 1)
        context = network.context(found.x, found.positions)
        index = first[..., None] + torch.arange(1, D + 1, device=first.device)
        lengths = torch.tensor(lesson.lengths, device=first.device)[:, None, None]
        drafts = Drafts(anchors, index, index < lengths)
        if network.config.form == "block":
            return drafts, network.block(context, anchors)[:, :, :D]
        state, _ = network.step(
            anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible, None, None
        )
        all_states, own = [state], None
        for d in range(1, D):
            feature = network.feature_state(state)
            x = network.entry(feature, self._parents(lesson, index[..., d : d + 1]), anchors.image[:, None])
            mask = torch.ones(*x.shape[:3], d, dtype=torch.bool, device=x.device)
            state, own = network.step(x, anchors.positions[..., None] + d, context, anchors.visible, own, mask)
            all_states.append(state)
        return drafts, torch.cat(all_states, 2)

    def everywhere(self, lesson: Lesson) -> tuple[Drafts, Tensor]:
        """`states` with every answer token but the last as a root."""
        device = lesson.answers.device
        first = torch.arange(max(lesson.lengths) - 1, device=device).expand(len(lesson.lengths), -1)
        return self.states(lesson, first)

    def routes(self, lesson: Lesson, drafts: Drafts, states: Tensor) -> Tensor:
        """Router log-probabilities [B, A, D, M]; they teach the router and nothing behind it."""
        anchors, network = drafts.anchors, self.network
        feature = network.feature_state(states[:, :, :-1].detach())
        if network.config.form == "ar":
            feature = feature.detach()
        feature = torch.cat([anchors.feature.detach()[:, :, None], feature], 2)
        return network.route(feature, self._parents(lesson, drafts.index))

    def endings(self, lesson: Lesson, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """(logits [B, A] of the first drafted token being the answer's last, whether it is [B, A] bool)."""
        anchors = drafts.anchors
        said = self.network.ends(anchors.feature.detach(), anchors.embedding)
        last = torch.isin(drafts.read(lesson.answers)[:, :, 0], self.end_ids.to(said.device))
        return said, last & drafts.valid[:, :, 0]

    def logits(self, lesson: Lesson, drafts: Drafts, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Draft logits [B, A, D, Vd] under modality weights [B, A, D, M], and confidence logits [B, A, D]."""
        heads = self.network.heads
        parts = heads.parts(states, drafts.anchors.image[:, None])
        z = (heads.coefficients(weights)[..., None] * parts).sum(-2)
        parent = self._parents(lesson, drafts.index)
        logits = heads.head(z)
        if heads.block:
            logits = logits + heads.given_parent(heads.from_state(z), parent, weights)
        return logits, heads.sure(z.detach(), parent)

    def forward(self, lesson: Lesson, labels: Tensor, first: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts. labels [B, T] modality ids of the answer tokens; first [B, A] which of them are roots."""
        drafts, states = self.states(lesson, first)
        kind = (drafts.read(labels)[..., None] == self.kinds.to(labels.device)).float()  # [B, A, D, M]
        route = self.routes(lesson, drafts, states)
        weights = route.detach().exp()
        if self.network.config.subtrees:  # the first level of a subtree is its own expert's
            weights = torch.cat([kind[:, :, :1], weights[:, :, 1:]], 2)
        logits, sure = self.logits(lesson, drafts, states, weights)
        c = self.config
        log_q = logits.float().log_softmax(-1)
        p = drafts.read(lesson.logits.exp())
        assert lesson.taps is not None
        truth = drafts.read(lesson.taps[:, lesson.prompt - 1 : -1, -states.shape[-1] :])
        # the target's last state is normalised, so the draft's is compared as the heads see it
        each, met = position_losses(log_q, p, self.network.heads.norm(states), truth, c)
        depth_weight = c.decay ** torch.arange(self.depth, device=p.device) * drafts.valid
        total = (kind * depth_weight[..., None]).sum((0, 1, 2))  # [M]
        terms = (each[..., None] * kind * depth_weight[..., None]).sum((0, 1, 2)) / total.clamp_min(1e-6)
        loss = self.weights(terms, total > 0)
        count = drafts.valid.sum().clamp_min(1)
        routing = -((route * kind).sum(-1) * drafts.valid).sum() / count
        confidence = (F.binary_cross_entropy_with_logits(sure, met, reduction="none") * drafts.valid).sum() / count
        loss = loss + (c.router * routing if self.network.router is not None else 0.0) + c.confidence * confidence
        said, last = self.endings(lesson, drafts)
        first_valid = drafts.valid[:, :, 0]
        ending = F.binary_cross_entropy_with_logits(said.float(), last.float(), reduction="none")
        loss = loss + c.ending * (ending * first_valid).sum() / first_valid.sum().clamp_min(1)
        names = self.network.config.modalities
        parts = {name: float(t) for name, t, n in zip(names, terms.detach(), total, strict=True) if n > 0}
        acceptance = (met * drafts.valid).sum() / count
        weighting = {f"λ_{name}": float(w) for name, w in zip(names, self.weights.values().detach(), strict=True)}
        return loss, {**parts, "router": float(routing.detach()), "acceptance": float(acceptance), **weighting}

    def acceptance(self, lesson: Lesson, labels: Tensor) -> dict[str, list[int]]:
        """See `chain_acceptance`."""
        return chain_acceptance(self, lesson, labels)

    def _parents(self, lesson: Lesson, index: Tensor) -> Tensor:
        """Embeddings [B, A, D, H] of the tokens before the answer tokens `index`."""
        return self.network.embed(_read(lesson.answers, index - 1))


@torch.no_grad()
def chain_acceptance(objective: DraftObjective, lesson: Lesson, labels: Tensor, depth: int = 5) -> dict[str, list[int]]:
    """[accepted, drafted] per modality name on top-1 chains from every answer token; see `count_chain`."""
    drafts, states = objective.everywhere(lesson)
    logits, _ = objective.logits(lesson, drafts, states, objective.routes(lesson, drafts, states).exp())
    guess = objective.network.heads.ids[logits[:, :, :depth].argmax(-1)]
    return count_chain(lesson, labels, guess, objective.network.config.modalities)


def count_chain(lesson: Lesson, labels: Tensor, guess: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    """[accepted, drafted] per modality name of chains of guesses [B, A, D] below answer tokens 0 to A-1.

    Below a rejection nothing counts. The lesson's answers must be the target's greedy ones, which is what a draft is
    accepted against at temperature 0. labels: [B, T] modality ids of the answer tokens.
    """
    A, D = guess.shape[1:]
    index = torch.arange(A, device=guess.device)[:, None] + torch.arange(1, D + 1, device=guess.device)
    index = index.expand(len(guess), -1, -1)
    valid = index < torch.tensor(lesson.lengths, device=guess.device)[:, None, None]
    right = guess == _read(lesson.answers, index)
    reached = torch.cat([torch.ones_like(right[..., :1]), right[..., :-1].cumprod(-1).bool()], -1)
    counts, kind = reached & valid, _read(labels, index)
    return {
        name: [
            int((right & counts & (kind == modality.get(name).id)).sum()),
            int((counts & (kind == modality.get(name).id)).sum()),
        ]
        for name in names
    }
