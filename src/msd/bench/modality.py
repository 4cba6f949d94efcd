"""Measures acceptance by modality, and the target's probability of its most probable tokens.

    acceptance   a chain of top-1 drafts, depth 5: the share of drafted positions whose draft was accepted
    coverage     a draft tree: the share of drafted positions at which the tree holds the target's token

Decoding is greedy, so the answer does not depend on the drafts, and each of its tokens has one modality label, from its
image gain (`msd.labels.gain`). `msd.bench.errors.drafted_positions` defines which positions count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.bench.data import Sample
from msd.bench.errors import kinds_of, modalities, pattern, rate
from msd.bench.timing import PLAIN, Run, time_engine
from msd.config import SpeculativeConfig
from msd.core.modality import FUSION, LANGUAGE, VISION
from msd.core.statistics import RowStep
from msd.drafters import auxiliary
from msd.events import open_chunks
from msd.events.auxiliary import costs_of_recordings
from msd.labels.gain import image_gain
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.targets import Target
from msd.targets.teacher import run_teacher

CHAIN = SpeculativeConfig(nodes=5, depth=5, width=1, adaptive=False)
SHIPPED = Path(__file__).parents[1] / "reference" / "weights" / "modality.json"
TOP = (1, 4, 8)  # numbers of tokens whose probability is summed

Errors = list[dict[str, Any]]  # see `msd.bench.errors.pattern`


def rates(errors: Errors) -> dict[str, float | None]:
    """Returns the acceptance rate of each modality; None without positions."""
    return {name: _acceptance(errors, modality=name) for name in _modalities(errors)}


def counts(errors: Errors) -> dict[str, int]:
    """Returns the number of positions of each modality."""
    return {name: rate(errors, modality=name)[1] for name in _modalities(errors)}


def rates_by_depth(errors: Errors) -> dict[str, list[float | None]]:
    """Returns the acceptance rates of each modality at depths 1, 2, …, given that all parents were accepted."""
    depths = range(1, max((error["depth"] for error in errors), default=0) + 1)
    return {name: [_acceptance(errors, modality=name, depth=d) for d in depths] for name in _modalities(errors)}


def _acceptance(errors: Errors, **fields: Any) -> float | None:
    rejected, drafted = rate(errors, **fields)
    return (drafted - rejected) / drafted if drafted else None


def _modalities(errors: Errors) -> list[str]:
    """Returns the names vision, language, fusion, and of any other modality that occurs."""
    return list(dict.fromkeys([*(m.name for m in (VISION, LANGUAGE, FUSION)), *modalities([errors])]))


def label_answer(
    target: Target,
    label_thresholds: ModalityThresholds,
    inputs: dict[str, Any],
    tokens: Sequence[int],
    events: Path | None = None,
    frames: int = 1,
) -> list[int]:
    """Returns the modality ids of an answer's tokens, up to the first image placeholder in it.

    inputs: processor output for the prompt. events: a recording of what the prompt's `frames` images show; with it, and
    label thresholds for events, labels come from the recording.
    """
    labelled = list(takewhile(lambda token: token not in target.placeholders, tokens))
    if not labelled:
        return []
    if events is None or label_thresholds.events is None:
        return [int(m) for m in label_thresholds.labels(image_gain(target, inputs, [labelled])[0])]
    costs = costs_of_recordings(target, inputs, [labelled], [open_chunks(events)], [frames])
    return [int(m) for m in label_thresholds.events.labels(costs[0])]


def labels_of_common_prefix(labels: Sequence[int], answer: Sequence[int], other: Sequence[int]) -> Sequence[int]:
    """Returns the labels of `answer` up to its first difference from `other`, such as a tie that rounding broke."""
    pairs = enumerate(zip(answer, other, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(answer), len(other)))
    return labels[:end]


def find_label_thresholds(target: str, file: Path | None) -> ModalityThresholds | None:
    """Returns the label thresholds in `file`, or those of the reference target, or None.

    Raises UserError for an invalid file.
    """
    if file is not None:
        return ModalityThresholds.load(file)
    return ModalityThresholds.load(SHIPPED) if target == "reference" and SHIPPED.exists() else None


@dataclass(frozen=True)
class LabelledSample:
    """The labels of one sample's answers. Labels end at the first difference from the library's answer.

    words: the kind of word of each answer token. chains: method -> (steps of its chain decoding, modality ids).
    trees: method -> modality ids of its timed answer.
    """

    words: list[str]
    chains: dict[str, tuple[list[RowStep], list[int]]]
    trees: dict[str, list[int]]


class Labeller:
    """Labels the answers to a sample, and decodes it once more with draft chains."""

    def __init__(
        self, engines: Mapping[str, SpeculativeVLM], label_thresholds: ModalityThresholds, settings: dict[str, Any]
    ) -> None:
        """engines: by method, plain decoding included."""
        self.plain, self.label_thresholds, self.settings = engines[PLAIN], label_thresholds, settings
        self.chains = {
            name: SpeculativeVLM(e.model, e.processor, CHAIN, e.drafter) for name, e in engines.items() if name != PLAIN
        }

    def __call__(
        self, inputs: dict[str, Any], sample: Sample, answer: list[int], runs: Mapping[str, Run]
    ) -> LabelledSample:
        """inputs: processor output for the sample. answer: the library's. runs: the timed answers by method."""
        labels = label_answer(
            self.plain.target, self.label_thresholds, inputs, answer, sample.events, len(sample.images)
        )
        tokenizer = self.plain.processor.tokenizer
        words = kinds_of([tokenizer.decode([token], skip_special_tokens=True) for token in answer])
        chains, trees = {}, {}
        for name, engine in self.chains.items():
            events = auxiliary.argument(engine.drafter, "events", [sample.events])
            run = time_engine(engine, {**inputs, **events}, self.settings, 0)
            chains[name] = (run.statistics.steps, list(labels_of_common_prefix(labels, answer, run.answers[0])))
            trees[name] = list(labels_of_common_prefix(labels, answer, runs[name].answers[0]))
        return LabelledSample(words, chains, trees)


def columns(
    labels: Sequence[LabelledSample], runs: Mapping[str, Sequence[Run]], name: str, samples: Sequence[int]
) -> dict[str, Any]:
    """Returns the columns by modality of the row of method `name` over the samples with these indices."""
    chains = pattern((*labels[i].chains[name], labels[i].words) for i in samples)
    trees = pattern((runs[name][i].statistics.steps, labels[i].trees[name], labels[i].words) for i in samples)
    return {
        "acceptance_by_modality": rates(chains),
        "coverage_by_modality": rates(trees),
        "acceptance_by_depth": rates_by_depth(chains),
        "positions_by_modality": {"acceptance": counts(chains), "coverage": counts(trees)},
        "errors": chains,
    }


@torch.inference_mode()
def top_probabilities(target: Target, inputs: dict[str, Any], tokens: Sequence[int], temperature: float) -> Tensor:
    """Returns [T, 3]: the summed probability of the 1, 4 and 8 most probable tokens at each answer token.

    The answer ends at the first image placeholder in it. temperature: 0, greedy decoding, counts as 1.
    """
    answer = list(takewhile(lambda token: token not in target.placeholders, tokens))
    if not answer:
        return torch.zeros(0, len(TOP))
    logits = run_teacher(target, dict(inputs), [answer]).logits[0] / (temperature or 1.0)
    return logits.softmax(-1).topk(max(TOP), -1).values.cumsum(-1)[:, [n - 1 for n in TOP]]


def mean_top_probabilities(answers: Iterable[Tensor]) -> dict[str, float] | None:
    """Returns the means of `top_probabilities` over all tokens, by number of tokens as text; None without tokens."""
    rows = torch.cat([torch.zeros(0, len(TOP)), *answers])
    return {str(n): float(m) for n, m in zip(TOP, rows.mean(0), strict=True)} if len(rows) else None
