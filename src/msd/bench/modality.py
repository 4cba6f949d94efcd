"""Acceptance by modality: how often drafts are right where the image matters, and where it does not.

Greedy decoding only: the answer is then the same whatever was drafted, and each of its tokens has one label, the class
of the image's gain there (`msd.labels.gain`).

    acceptance   a chain of top-1 drafts, depth 5: the share of drafted positions whose draft was the target's token
    coverage     a draft tree: the share of drafted positions at which the tree held the target's token

A step drafts the answer positions below its root. The accepted ones count as hits, the first rejected one as a miss;
what was drafted below a rejection or beyond the answer's end does not count, so no position counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.bench.data import Sample
from msd.bench.errors import kinds_of, pattern
from msd.bench.timing import PLAIN, Run, ours
from msd.config import SpeculativeConfig
from msd.core.modality import FUSION, LANGUAGE, VISION, Modality, known
from msd.core.statistics import RowStep
from msd.drafters import recordings
from msd.events import open_chunks
from msd.labels.gain import costs_of_recordings, image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.targets import Target
from msd.targets.teacher import run_teacher

CHAIN = SpeculativeConfig(nodes=5, depth=5, width=1, adaptive=False)
SHIPPED = Path(__file__).parents[1] / "reference" / "weights" / "modality.json"

Labelled = tuple[Iterable[RowStep], Sequence[int]]  # one answer's steps, and the modality ids of its tokens


@dataclass
class Tally:
    """Positions drafted and positions hit, by (modality id, depth in the draft, 1 for the first drafted token)."""

    positions: Counter[tuple[int, int]] = field(default_factory=Counter)
    hits: Counter[tuple[int, int]] = field(default_factory=Counter)

    def rates(self) -> dict[str, float | None]:
        """Modality name -> hits per position; None without positions."""
        seen = {m: (_of(self.hits, m.id), _of(self.positions, m.id)) for m in self.modalities()}
        return {m.name: hits / n if n else None for m, (hits, n) in seen.items()}

    def counts(self) -> dict[str, int]:
        """Modality name -> positions."""
        return {m.name: _of(self.positions, m.id) for m in self.modalities()}

    def by_depth(self) -> dict[str, list[float | None]]:
        """Modality name -> hits per position at depths 1, 2, …: of the positions whose parents were all accepted."""
        deepest = max((depth for _, depth in self.positions), default=0)
        return {
            m.name: [
                self.hits[m.id, d] / self.positions[m.id, d] if self.positions[m.id, d] else None
                for d in range(1, deepest + 1)
            ]
            for m in self.modalities()
        }

    def modalities(self) -> list[Modality]:
        """Vision, language, fusion, and others that occur."""
        seen = {kind for kind, _ in self.positions}
        return [VISION, LANGUAGE, FUSION, *(m for m in known() if m.id in seen - {VISION.id, LANGUAGE.id, FUSION.id})]


def _of(counts: Counter[tuple[int, int]], modality: int) -> int:
    return sum(n for (kind, _), n in counts.items() if kind == modality)


def acceptance_by_modality(chains: Iterable[Labelled]) -> Tally:
    """Of answers decoded on chains of top-1 drafts (`CHAIN`)."""
    return _tally(chains)


def coverage_by_modality(trees: Iterable[Labelled]) -> Tally:
    """Of answers decoded on draft trees."""
    return _tally(trees)


def _tally(answers: Iterable[Labelled]) -> Tally:
    """Below the last accepted draft the tree had no node with the target's token, or no node at all where it ended."""
    tally = Tally()
    for steps, labels in answers:
        for step in steps:
            for level in range(min(step.accepted + 1, step.levels)):
                if step.first + level < len(labels):
                    place = labels[step.first + level], level + 1
                    tally.positions[place] += 1
                    tally.hits[place] += level < step.accepted
    return tally


def label_answer(
    target: Target,
    cuts: ModalityThresholds,
    inputs: dict[str, Any],
    tokens: Sequence[int],
    events: Path | None = None,
    frames: int = 1,
) -> list[int]:
    """Modality ids of the answer `tokens` to one prompt (processor output), up to a spelled image placeholder.

    events: a recording of what the prompt's `frames` images show, in which labels are looked for if `cuts` has those.
    """
    taught = list(takewhile(lambda token: token not in target.placeholders, tokens))
    if not taught:
        return []
    if events is None or cuts.events is None:
        return [int(m) for m in cuts.labels(image_gain(target, inputs, [taught])[0])]
    costs = costs_of_recordings(target, inputs, [taught], [open_chunks(events)], [frames])
    return [int(m) for m in cuts.events.labels(costs[0])]


def shared(labels: Sequence[int], answer: Sequence[int], other: Sequence[int]) -> Sequence[int]:
    """Labels of `answer` as far as `other` says the same (ties in rounding may part the two)."""
    pairs = enumerate(zip(answer, other, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(answer), len(other)))
    return labels[:end]


def find_cuts(target: str, file: Path | None) -> ModalityThresholds | None:
    """The cuts in `file`, or those shipped with the reference target, or None. UserError for a bad file."""
    if file is not None:
        return ModalityThresholds.load(file)
    return ModalityThresholds.load(SHIPPED) if target == "reference" and SHIPPED.exists() else None


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

    def __init__(
        self, engines: Mapping[str, SpeculativeVLM], cuts: ModalityThresholds, settings: dict[str, Any]
    ) -> None:
        """engines: by method, plain decoding among them."""
        self.plain, self.cuts, self.settings = engines[PLAIN], cuts, settings
        self.chains = {
            name: SpeculativeVLM(e.model, e.processor, CHAIN, e.drafter) for name, e in engines.items() if name != PLAIN
        }

    def __call__(
        self, inputs: dict[str, Any], sample: Sample, answer: list[int], runs: Mapping[str, Run]
    ) -> LabelledSample:
        """Of one sample. inputs: its processor output; answer: the library's; runs: the methods' timed answers."""
        labels = label_answer(self.plain.target, self.cuts, inputs, answer, sample.events, len(sample.images))
        tokenizer = self.plain.processor.tokenizer
        words = kinds_of([tokenizer.decode([token], skip_special_tokens=True) for token in answer])
        chains, trees = {}, {}
        for name, engine in self.chains.items():
            seen = recordings.argument(engine.drafter, [sample.events])
            found = ours(engine, {**inputs, **seen}, self.settings, 0)
            chains[name] = (found.statistics.steps, list(shared(labels, answer, found.answers[0])))
            trees[name] = list(shared(labels, answer, runs[name].answers[0]))
        return LabelledSample(words, chains, trees)


def columns(
    labels: Sequence[LabelledSample], runs: Mapping[str, Sequence[Run]], name: str, chosen: Sequence[int]
) -> dict[str, Any]:
    """The columns by modality of a method's row about the `chosen` samples."""
    acceptance = acceptance_by_modality(labels[i].chains[name] for i in chosen)
    coverage = coverage_by_modality((runs[name][i].statistics.steps, labels[i].trees[name]) for i in chosen)
    return {
        "acceptance_by_modality": acceptance.rates(),
        "coverage_by_modality": coverage.rates(),
        "acceptance_by_depth": acceptance.by_depth(),
        "positions_by_modality": {"acceptance": acceptance.counts(), "coverage": coverage.counts()},
        "errors": pattern((*labels[i].chains[name], labels[i].words) for i in chosen),
    }


SIZES = (1, 4, 8)


@torch.inference_mode()
def top_mass(target: Target, inputs: dict[str, Any], tokens: Sequence[int], temperature: float) -> Tensor:
    """[T, 3]: mass of the likeliest 1, 4 and 8 tokens at `temperature` (1 for greedy) at every answer token.

    The answer counts up to a spelled image placeholder.
    """
    said = list(takewhile(lambda token: token not in target.placeholders, tokens))
    if not said:
        return torch.zeros(0, len(SIZES))
    logits = run_teacher(target, dict(inputs), [said]).logits[0] / (temperature or 1.0)
    return logits.softmax(-1).topk(max(SIZES), -1).values.cumsum(-1)[:, [n - 1 for n in SIZES]]


def mean_mass(masses: Iterable[Tensor]) -> dict[str, float] | None:
    """Means over all tokens of several answers, by size as text; None without tokens."""
    found = torch.cat([torch.zeros(0, len(SIZES)), *masses])
    return {str(n): float(m) for n, m in zip(SIZES, found.mean(0), strict=True)} if len(found) else None
