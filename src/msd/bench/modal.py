"""Acceptance by modality: how often drafts are right where the image matters, and where it does not.

Greedy decoding only: the answer is then the same whatever was drafted, and each of its tokens has one label, the class
of the image's gain there (`msd.labels.image_gain`).

    acceptance   a chain of top-1 drafts, depth 5: the share of drafted positions whose draft was the target's token
    coverage     a draft tree: the share of drafted positions at which the tree held the target's token

A step drafts the answer positions below its root. The accepted ones count as hits, the first rejected one as a miss;
what was drafted below a rejection or beyond the answer's end does not count, so no position counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from msd.config import SpeculativeConfig
from msd.core.modality import FUSION, LANGUAGE, VISION, Modality, known
from msd.core.statistics import RowStep
from msd.events import open_chunks
from msd.labels.event_gain import costs_of_recordings
from msd.labels.image_gain import image_gain
from msd.labels.label_thresholds import ModalityCuts
from msd.targets import Target

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
    cuts: ModalityCuts,
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


def find_cuts(target: str, file: Path | None) -> ModalityCuts | None:
    """The cuts in `file`, or those shipped with the reference target, or None. UserError for a bad file."""
    if file is not None:
        return ModalityCuts.load(file)
    return ModalityCuts.load(SHIPPED) if target == "reference" and SHIPPED.exists() else None
