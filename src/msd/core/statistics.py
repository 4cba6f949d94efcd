"""Statistics of a generation: token counts under vLLM's names, and wall time by part."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from msd.core.modality import known
from msd.core.tree import Accepted, DraftTree, Step


class RowStep(NamedTuple):
    """One step of one row.

    first: the index, in the row's answer, of the first token that the step emitted. levels: the depth of the row's
    tree. accepted: the number of accepted drafts; they are the answer tokens first … first + accepted - 1.
    """

    row: int
    first: int
    levels: int
    accepted: int


@dataclass
class Statistics:
    """Counts over all rows of a generation. A *step* is one target pass over one row's tree, without prefill."""

    num_prefill_rows: int = 0  # prompt columns that the target computed, without those cached from earlier turns
    num_spec_steps: int = 0
    num_spec_tokens: int = 0  # levels of the deepest tree: the most tokens that a step may have accepted
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0  # without the first token of each answer, which prefill emits
    acceptance_histogram: Counter[int] = field(default_factory=Counter)  # accepted drafts in a step -> steps
    # prefill, draft, verify (target passes), host, total; for auxiliary tokens see `msd.drafters.overlap`
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: list[RowStep] = field(default_factory=list)  # `add` does not merge them
    divergence: dict[str, tuple[int, float]] = field(default_factory=dict)  # modality -> (tokens, Σ TV), if lossy
    predicted: dict[int, list[str]] = field(default_factory=dict)  # row -> predicted modality of each token of a step
    _emitted: Counter[int] = field(default_factory=Counter)  # row -> tokens emitted in steps

    @property
    def mean_acceptance_length(self) -> float:
        """τ: tokens emitted per target pass, bonus token included. 1.0 for plain decoding; 0.0 without a step."""
        return self.num_emitted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0

    @property
    def tau_without_bonus(self) -> float:
        """Accepted drafts per target pass (what ViSpec and zju-SpecVLM print)."""
        return self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the drafted nodes that were accepted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def read(self, step: Step) -> None:
        """Adds one step. The prefill step adds only the seconds of the drafter's `begin`."""
        self.seconds["draft"] += step.draft_seconds
        self.seconds["verify"] += step.score_seconds
        if not step.prefill:
            self.count(step.tree, step.accepted)

    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """Adds the counts and predicted modalities of one step, for each row that was unfinished before it."""
        drafted, levels = torch.stack([tree.valid.sum(1) - 1, (tree.depths * tree.valid).amax(1)]).tolist()
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens and row not in accepted.padded:
                self.num_spec_steps += 1
                self.num_spec_tokens = max(self.num_spec_tokens, levels[row])
                self.num_draft_tokens += drafted[row]
                self.num_accepted_draft_tokens += len(nodes)
                self.num_emitted_tokens += len(tokens)
                self.acceptance_histogram[len(nodes)] += 1
                self.steps.append(RowStep(row, 1 + self._emitted[row], levels[row], len(nodes)))
                self._emitted[row] += len(tokens)
        names = [modality.name for modality in known()]
        for row, kinds in enumerate(accepted.modality or ()):
            if row not in accepted.padded:
                self.predicted.setdefault(row, []).extend(names[kind] for kind in kinds)
                if accepted.divergence is not None:
                    for kind, total_variation in zip(kinds, accepted.divergence[row], strict=True):
                        self._spend(names[kind], 1, total_variation)

    def _spend(self, modality: str, tokens: int, total_variation: float) -> None:
        """Adds `tokens` tokens with a summed total variation to the count of a modality."""
        n, total = self.divergence.get(modality, (0, 0.0))
        self.divergence[modality] = (n + tokens, total + total_variation)

    def add(self, other: Statistics) -> None:
        """Adds the counts and times of another generation."""
        self.num_prefill_rows += other.num_prefill_rows
        self.num_spec_steps += other.num_spec_steps
        self.num_spec_tokens = max(self.num_spec_tokens, other.num_spec_tokens)
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_draft_tokens += other.num_accepted_draft_tokens
        self.num_emitted_tokens += other.num_emitted_tokens
        self.acceptance_histogram.update(other.acceptance_histogram)
        for part, seconds in other.seconds.items():
            self.seconds[part] += seconds
        for modality, (tokens, total_variation) in other.divergence.items():
            self._spend(modality, tokens, total_variation)

    def _divergence(self) -> dict[str, Any] | None:
        """Total variation distance from the target's distribution; None for a lossless policy.

        "per_token" is the mean, "total" the sum, which bounds the distance of the whole answer. The first token of an
        answer, which prefill emits, is exact and not counted.
        """
        if not self.divergence:
            return None

        def summary(tokens: int, total: float) -> dict[str, float]:
            return {"tokens": tokens, "per_token": total / tokens, "total": total}

        overall = summary(sum(n for n, _ in self.divergence.values()), sum(tv for _, tv in self.divergence.values()))
        return {**overall, "by_modality": {name: summary(*v) for name, v in sorted(self.divergence.items())}}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the wall time of the block to `seconds[part]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, under vLLM's names."""
        return {
            "mean_acceptance_length": self.mean_acceptance_length,
            "tau_without_bonus": self.tau_without_bonus,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_by_modality": None,  # filled by `msd bench`, which labels answer tokens
            "divergence": self._divergence(),
            "acceptance_histogram": {str(k): v for k, v in sorted(self.acceptance_histogram.items())},
            "num_prefill_rows": self.num_prefill_rows,
            "num_spec_steps": self.num_spec_steps,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            "num_spec_tokens": self.num_spec_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "seconds": dict(self.seconds),
        }
