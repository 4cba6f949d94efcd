"""MSDVerification: verifies a chain of drafted tokens from plain probabilities, without a tree or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msd.core import modality
from msd.errors import UserError
from msd.verify import registry
from msd.verify.builtin.budget import Ledger
from msd.verify.divergence import sampled_distribution, total_variation
from msd.verify.rejection import Rule, checked_epsilon, residual, thresholds_by_id


@dataclass(frozen=True)
class Verified:
    """The result of verifying a chain.

    tokens: the emitted ids: the accepted ones, then the recovered or bonus token, if any. accepted: the number of
    accepted drafts. divergence: for each emitted token, the exact total variation of its distribution from p.
    """

    tokens: list[int]
    accepted: int
    divergence: list[float]


class MSDVerification:
    """Modality-aware verification of drafted tokens that were sampled from `draft_probs`.

    policy: "threshold", "budget" or "lossless". thresholds: modality name -> θ; the registry's default for all others.
    epsilon: the mean total variation per token that `budget` may spend for each modality. The balance carries over from
    call to call, so use one object per answer.
    """

    def __init__(
        self, policy: str = "threshold", thresholds: Mapping[str, float] | None = None, epsilon: float = 0.0
    ) -> None:
        rule: Rule | None = getattr(registry.policy(policy), "rule", None)
        if rule is None:
            raise UserError(f"verifier '{policy}' has no rule for one sampled token; choose another policy")
        self.policy, self.epsilon, self._rule = policy, checked_epsilon(epsilon), rule
        self.thresholds = thresholds_by_id(thresholds or {})
        self._ledgers = {kind: Ledger(epsilon, threshold) for kind, threshold in self.thresholds.items()}

    def verify(
        self,
        draft_tokens: Tensor | Sequence[int],
        target_probs: Tensor,
        draft_probs: Tensor,
        modalities: Sequence[str | int],
        generator: torch.Generator | None = None,
    ) -> Verified:
        """Accepts drafts in order until one is rejected; a token from the residual distribution replaces that one.

        draft_tokens: [n]. target_probs: p, [n, V], or [n + 1, V] for a bonus token after the last draft. draft_probs:
        q, [n, V]. modalities: n names or ids, the predicted modality of each position. Probabilities are those after
        temperature and all other processors; for greedy decoding give one-hot p, and every θ emits the argmax. Raises
        UserError if the arguments do not match.
        """
        tokens = [int(t) for t in draft_tokens]
        kinds = [self._kind(m) for m in modalities]
        _check(tokens, kinds, target_probs, draft_probs)
        emitted: list[int] = []
        divergence: list[float] = []
        rule, policy = self._rule, registry.policy(self.policy)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            p, q = target_probs[i].double(), draft_probs[i].double()
            threshold, ledger = self.thresholds[kind], self._ledgers[kind]
            if policy.calibrated:
                threshold = ledger.threshold(_divergence(p, q, ledger.preferred, rule))
            spent = 0.0 if policy.lossless else _divergence(p, q, threshold, rule)
            ledger.spend(spent)
            divergence.append(spent)
            alpha = float(rule(p[token], q[token], threshold))
            if float(torch.rand((), generator=generator, dtype=torch.float64)) < alpha:
                emitted.append(token)
                continue
            emitted.append(_draw(residual(p, q), generator))
            return Verified(emitted, i, divergence)
        if len(target_probs) > len(tokens):
            emitted.append(_draw(target_probs[-1].double(), generator))
            divergence.append(0.0)
        return Verified(emitted, len(tokens), divergence)

    def _kind(self, name: str | int) -> int:
        """The modality id of a name or id."""
        kind = modality.get(name).id if isinstance(name, str) else int(name)
        if kind not in self.thresholds:
            raise UserError(f"modality {name!r} was not registered when this verification was made")
        return kind


def _divergence(p: Tensor, q: Tensor, threshold: float, rule: Rule) -> float:
    """Total variation from p of the output with one candidate from q [V]."""
    return float(total_variation(sampled_distribution(p, q[None], threshold, rule), p))


def _draw(p: Tensor, generator: torch.Generator | None) -> int:
    """One token from p [V]."""
    return int(torch.multinomial(p, 1, generator=generator))


def _check(tokens: list[int], kinds: list[int], p: Tensor, q: Tensor) -> None:
    """Raises UserError unless shapes, ids and probabilities match."""
    n = len(tokens)
    if q.dim() != 2 or p.dim() != 2 or p.shape[1] != q.shape[1] or len(q) != n or len(p) not in (n, n + 1):
        raise UserError(
            f"{n} draft tokens need draft_probs [{n}, V] and target_probs [{n} or {n + 1}, V], got {list(q.shape)} and "
            f"{list(p.shape)}"
        )
    if len(kinds) != n:
        raise UserError(f"{n} draft tokens but {len(kinds)} modalities; give one for each")
    if bad := [t for t in tokens if not 0 <= t < q.shape[1]]:
        raise UserError(f"draft token {bad[0]} is outside the vocabulary of {q.shape[1]}")
    for name, rows in (("target_probs", p), ("draft_probs", q)):
        if len(rows) and not bool(((rows >= 0).all(-1) & ((rows.double().sum(-1) - 1).abs() < 1e-3)).all()):
            raise UserError(f"{name} has a row that is no probability distribution: entries must be ≥ 0 and sum to 1")
