"""What a drafter is worth on answers it does not learn from, and the thresholds that are fitted on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from msd.config import SpeculativeConfig
from msd.core.modality import known
from msd.core.sampling import Sampler
from msd.drafters import Drafter
from msd.drafters.toolkit.training import Objective
from msd.model import SpeculativeVLM
from msd.targets.teacher import TeacherBatch
from msd.train.capture import Captured
from msd.train.teacher_batches import TeacherBatches
from msd.verify import Budget, calibrate
from msd.verify.lossy import Position

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)


class HeldOut:
    """Held-out chain acceptance: by modality in answers about images, and of all answers without one ("text")."""

    def __init__(self, objective: Objective, batches: TeacherBatches, held_out: Sequence[Captured]) -> None:
        self.objective, self.batches = objective, batches
        some = [c for c in held_out if len(c.ids) > 1]
        self.about_images, self.text = ([c for c in some if bool(c.images) == images] for images in (True, False))
        self.last: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        """The rates, by name; "acceptance" is that of all answers about images."""
        self.objective.eval()
        seen, text = self._counts(self.about_images), self._counts(self.text)
        self.objective.train()
        self.last = {name: accepted / max(1, drafted) for name, (accepted, drafted) in seen.items()}
        for name, counts in (("text", text), ("acceptance", seen or text)):
            accepted, drafted = (sum(c[i] for c in counts.values()) for i in (0, 1))
            if drafted:
                self.last[name] = accepted / drafted
        return self.last

    def _counts(self, answers: Sequence[Captured]) -> dict[str, list[int]]:
        """Modality name -> [accepted, drafted]."""
        counts: dict[str, list[int]] = {}
        for batch, labels in self.batches.in_turn(answers):
            for name, (accepted, drafted) in self.objective.acceptance(batch, labels).items():
                old = counts.setdefault(name, [0, 0])
                counts[name] = [old[0] + accepted, old[1] + drafted]
        return counts

    def reports(self) -> dict[str, Any]:
        """Of a trained network; see `Objective.reports`."""
        return self.objective.reports(self._taught)

    def _taught(self) -> Iterator[tuple[TeacherBatch, Tensor]]:
        """The held-out answers about images, in batches; those without where there are no others."""
        return self.batches.in_turn(self.about_images or self.text)


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
    """str(ε) -> modality name -> least θ that keeps the mean total variation within ε on the recorded positions.

    A position's cost depends on P alone (docs/modality_verification.md), so it is solved as one of two tokens.
    """
    records = {}
    for name, found in masses.items():
        p = torch.tensor(found, dtype=torch.float64)
        records[name] = (torch.stack([p, 1 - p], 1), torch.tensor([[True, False]]).expand(len(found), -1))
    return {str(epsilon): calibrate(records, epsilon) for epsilon in budgets}
