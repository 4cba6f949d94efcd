"""θ of the `budget` policy for a drafter: recorded positions of sampled answers, solved per modality and budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from msd.config import SpeculativeConfig
from msd.drafters import Drafter
from msd.modality import known
from msd.model import SpeculativeVLM
from msd.sampling import Sampler
from msd.verify import Budget, calibrate
from msd.verify.lossy import Position

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)


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
