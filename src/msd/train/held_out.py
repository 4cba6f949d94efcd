"""Measures a drafter on held-out answers: chain acceptance, and the verification thresholds that meet a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from msd.config import SpeculativeConfig
from msd.core.modality import LANGUAGE, known
from msd.core.tree import Step
from msd.drafters import Drafter, registry
from msd.drafters.toolkit.calibration import calibrate
from msd.drafters.toolkit.training import Objective
from msd.model import SpeculativeVLM
from msd.train.capture import Captured, mixed
from msd.train.teacher_batches import LabelledBatch, TeacherBatches
from msd.verify import calibrate as solve_threshold
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
        """Fits the node chances; returns the fit and the objective's reports on a trained network.

        Both use the answers about images, or the text-only ones if there are none.
        """
        return self.calibrate() | self.objective.reports(self._batches)

    def calibrate(self) -> dict[str, Any]:
        """Fits the network's node chances; returns the fit (see `msd.drafters.toolkit.calibration`)."""
        self.objective.eval()
        fit = calibrate(self.objective, (batch for batch, _ in self._batches()))
        self.objective.train()
        return fit

    def _batches(self) -> Iterator[LabelledBatch]:
        return self.batches.in_order(self.with_images or self.text_only)


class Recorder:
    """Records P = Σ p(c), the target's probability of a node's drafted children c, at every emitted token, by modality.

    It reads the steps of a request that samples, with `output_scores` (see `SpeculativeVLM.generate`, `on_step`), whose
    drafts do not know the coming draws (`foresight`), as under a lossy policy.
    probabilities: modality id -> P at each position, in order.
    """

    def __init__(self) -> None:
        self.probabilities: dict[int, list[float]] = defaultdict(list)

    def __call__(self, step: Step) -> None:
        """Records the positions of one step; trees without drafts have none."""
        tree, accepted = step.tree, step.accepted
        if tree.height == 0:
            return
        assert accepted.logits is not None, "the request must ask for output_scores"
        for level in range(max(map(len, accepted.tokens))):
            rows = [row for row, tokens in enumerate(accepted.tokens) if len(tokens) > level]
            nodes = [accepted.nodes[row][level - 1] if level else 0 for row in rows]
            logits = torch.stack([accepted.logits[row][level][1] for row in rows])
            position = Position.at(tree, torch.tensor(nodes, device=logits.device), logits, rows)
            P = position.p.masked_fill(~position.drafted, 0.0).sum(-1).clamp_max(1.0).tolist()
            for row, probability in zip(rows, P, strict=True):
                kind = LANGUAGE.id if accepted.modality is None else accepted.modality[row][level]
                self.probabilities[kind].append(probability)


def record(
    model: Any,
    processor: Any,
    drafter: Drafter,
    prompts: Sequence[tuple[Sequence[Any], str]],
) -> dict[str, list[float]]:
    """Samples answers to (images, text) prompts; returns modality name -> P at every position (see `Recorder`)."""
    engine = SpeculativeVLM(model, processor, SpeculativeConfig(label=True, foresight=False), drafter)
    recorder = Recorder()
    for number, (images, text) in enumerate(prompts):
        engine.generate(
            list(images), text, seed=number, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64,
            return_dict_in_generate=True, output_scores=True, on_step=recorder,
        )  # fmt: skip
    return {known()[kind].name: P for kind, P in recorder.probabilities.items()}


def fitted_thresholds(
    folder: Path, model: Any, processor: Any, held_out: Sequence[Captured], count: int
) -> dict[str, Any]:
    """Fits the θ of `budget` for the drafter in `folder` on `count` held-out prompts; returns fields of its record."""
    network = registry.load(folder)
    prompts = [(answer.images, answer.prompt) for answer in mixed(held_out, count)]
    probabilities = record(model, processor, type(network).drafter(network), prompts)
    return {"thresholds": solve(probabilities), "calibrated_on": {k: len(v) for k, v in probabilities.items()}}


def solve(probabilities: dict[str, list[float]], budgets: Iterable[float] = BUDGETS) -> dict[str, dict[str, float]]:
    """str(ε) -> modality name -> the smallest θ that keeps the mean total variation within ε on the recorded positions.

    probabilities: from `record`. The cost of a position depends on P only (docs/modality_verification.md), so two
    tokens with the probabilities P and 1 - P represent it.
    """
    records = {}
    for name, values in probabilities.items():
        p = torch.tensor(values, dtype=torch.float64)
        records[name] = (torch.stack([p, 1 - p], 1), torch.tensor([[True, False]]).expand(len(values), -1))
    return {str(epsilon): solve_threshold(records, epsilon) for epsilon in budgets}
