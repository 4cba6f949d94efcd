"""What is measured of greedy answers beside the clock: the modality and the kind of word of each token, and chains.

Of each sample the library's answer is labelled, and every drafting method decodes it once more on chains (see `modal`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msd.bench import modal
from msd.bench.data import Sample
from msd.bench.errors import kinds_of, pattern
from msd.bench.timing import PLAIN, Run, ours
from msd.core.statistics import RowStep
from msd.drafters import recordings
from msd.labels.label_thresholds import ModalityCuts
from msd.model import SpeculativeVLM


@dataclass(frozen=True)
class LabelledSample:
    """words: a kind of word for each token of the answer. chains: method -> (steps of its chains, modality ids).

    trees: method -> modality ids of its timed answer. Both are as far as a method's answer is the library's.
    """

    words: list[str]
    chains: dict[str, tuple[list[RowStep], list[int]]]
    trees: dict[str, list[int]]


class Labeller:
    """Labels answers, and decodes each sample once more on chains."""

    def __init__(self, engines: Mapping[str, SpeculativeVLM], cuts: ModalityCuts, settings: dict[str, Any]) -> None:
        """engines: by method, plain decoding among them."""
        self.plain, self.cuts, self.settings = engines[PLAIN], cuts, settings
        self.chains = {
            name: SpeculativeVLM(e.model, e.processor, modal.CHAIN, e.drafter)
            for name, e in engines.items()
            if name != PLAIN
        }

    def __call__(
        self, inputs: dict[str, Any], sample: Sample, answer: list[int], runs: Mapping[str, Run]
    ) -> LabelledSample:
        """Of one sample. inputs: its processor output; answer: the library's; runs: the methods' timed answers."""
        labels = modal.label_answer(self.plain.target, self.cuts, inputs, answer, sample.events, len(sample.images))
        tokenizer = self.plain.processor.tokenizer
        words = kinds_of([tokenizer.decode([token], skip_special_tokens=True) for token in answer])
        chains, trees = {}, {}
        for name, engine in self.chains.items():
            seen = recordings.argument(engine.drafter, [sample.events])
            found = ours(engine, {**inputs, **seen}, self.settings, 0)
            chains[name] = (found.statistics.steps, list(modal.shared(labels, answer, found.answers[0])))
            trees[name] = list(modal.shared(labels, answer, runs[name].answers[0]))
        return LabelledSample(words, chains, trees)


def columns(
    labels: Sequence[LabelledSample], runs: Mapping[str, Sequence[Run]], name: str, chosen: Sequence[int]
) -> dict[str, Any]:
    """The columns by modality of a method's row about the `chosen` samples."""
    acceptance = modal.acceptance_by_modality(labels[i].chains[name] for i in chosen)
    coverage = modal.coverage_by_modality((runs[name][i].statistics.steps, labels[i].trees[name]) for i in chosen)
    return {
        "acceptance_by_modality": acceptance.rates(),
        "coverage_by_modality": coverage.rates(),
        "acceptance_by_depth": acceptance.by_depth(),
        "positions_by_modality": {"acceptance": acceptance.counts(), "coverage": coverage.counts()},
        "errors": pattern((*labels[i].chains[name], labels[i].words) for i in chosen),
    }
