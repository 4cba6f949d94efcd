"""Measures a drafter on held-out answers: chain acceptance, and the verification thresholds that meet a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from msd.config import SpeculativeConfig
from msd.core.modality import known
from msd.core.sampling import Sampler
from msd.drafters import Drafter
from msd.drafters.toolkit.training import Objective
from msd.model import SpeculativeVLM
from msd.train.capture import Captured
from msd.train.teacher_batches import TeacherBatches
from msd.verify import Budget, calibrate
from msd.verify.lossy import Position

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)


class HeldOutAcceptance:
    """Measures the acceptance of chain drafts on held-out answers.

    Answers about images are counted per modality of the token; text-only answers are counted together ("text").
    """

    def __init__(self, objective: Objective, batches: TeacherBatches, held_out: Sequence[Captured]) -> None:
        self.objective, self.batches = objective, batches
        self.with_images = [c for c in held_out if len(c.ids) > 1 and c.images]
        self.text_only = [c for c in held_out if len(c.ids) > 1 and not c.images]
        self.last: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        """Returns the acceptance rates by name; "acceptance" is the rate over all answers about images."""
        self.objective.eval()
        by_modality, text = self._counts(self.with_images), self._counts(self.text_only)
        self.objective.train()
        self.last = {name: accepted / max(1, drafted) for name, (accepted, drafted) in by_modality.items()}
        for name, counts in (("text", text), ("acceptance", by_modality or text)):
            accepted, drafted = (sum(c[i] for c in counts.values()) for i in (0, 1))
            if drafted:
                self.last[name] = accepted / drafted
        return self.last

    def _counts(self, answers: Sequence[Captured]) -> dict[str, list[int]]:
        """Returns modality name -> [accepted, drafted]."""
        counts: dict[str, list[int]] = {}
        for batch, labels in self.batches.in_order(answers):
            for name, (accepted, drafted) in self.objective.acceptance(batch, labels).items():
                old = counts.setdefault(name, [0, 0])
                counts[name] = [old[0] + accepted, old[1] + drafted]
        return counts

    def reports(self) -> dict[str, Any]:
        """Returns the objective's reports on the answers about images, or on the text-only ones if there are none."""
        return self.objective.reports(lambda: self.batches.in_order(self.with_images or self.text_only))


class Recorder(Budget):
    """Emits as `lossless` does (θ = 1 everywhere) and notes P, the mass that p gives a node's children, by modality."""

    def __init__(self) -> None:
        super().__init__(epsilon=1.0)
        self.masses: dict[int, list[float]] = defaultdict(list)

    def _theta(self, at: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        for kind, mass in zip(kinds, at.p.masked_fill(~at.drafted, 0.0).sum(-1).tolist(), strict=True):
            self.masses[kind].append(min(mass, 1.0))
        return [1.0] * len(kinds)

    def _learn(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:
        """Nothing is spent."""


def record(
    model: Any,
    processor: Any,
    drafter: Drafter,
    prompts: Sequence[tuple[Sequence[Any], str]],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    report: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Modality name -> P at every drafted position of answers sampled at `temperature` to (images, text) prompts."""
    engine = SpeculativeVLM(model, processor, SpeculativeConfig(), drafter)
    recorder = Recorder()
    engine.verifier = recorder
    for number, (images, text) in enumerate(prompts):
        engine.generate(
            list(images), text, seed=number, do_sample=True, temperature=temperature, top_k=0,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        if report:
            report(number + 1)
    return {known()[kind].name: masses for kind, masses in recorder.masses.items()}


def solve(masses: dict[str, list[float]], budgets: Iterable[float] = BUDGETS) -> dict[str, dict[str, float]]:
    """Returns str(ε) -> modality name -> smallest θ with a mean total variation of at most ε on recorded positions.

    The cost of a position depends on P alone (docs/modality_verification.md), so each is solved as a distribution over
    two tokens.
    """
    records = {}
    for name, found in masses.items():
        p = torch.tensor(found, dtype=torch.float64)
        records[name] = (torch.stack([p, 1 - p], 1), torch.tensor([[True, False]]).expand(len(found), -1))
    return {str(epsilon): calibrate(records, epsilon) for epsilon in budgets}
