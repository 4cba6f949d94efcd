"""The certificate of losslessness: token for token against `transformers` `generate()`, float32, greedy and same seed.

One row and many rows of a matrix product round differently, so two equally right computations can disagree where two
tokens are all but equally good. A first difference is counted as a *tie*, with its gap, only when the target computed
in float64 puts the two tokens closer than `TIE_GAP`; anything else fails. Where candidates are sampled, the same seed
gives other tokens by design, and the law is tested instead (χ²).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.bench.conversation import Conversation, check_prompts
from msd.bench.data import Sample
from msd.certify.chi2 import end_to_end_p_values, holm
from msd.config import SpeculativeConfig
from msd.drafters import auxiliary
from msd.errors import UserError
from msd.inputs import prompts
from msd.model import SpeculativeVLM

TIE_GAP = 1e-4
FALSE_ALARM = 1e-3
GREEDY: dict[str, Any] = {"do_sample": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0},
    "T=0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-p 0.9": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "top-k 20": {"do_sample": True, "top_k": 20},
    "repetition penalty 1.1": {"do_sample": True, "repetition_penalty": 1.1, "top_k": 0},
}

Report = Callable[[str], None]


@dataclass
class Row:
    """One method's certificate. `differences` describes each first difference that is no tie.

    finished: whether all that was to be compared has been; until then nothing has passed.
    """

    method: str
    compared: int = 0
    identical: int = 0
    tie_gaps: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    p_values: list[float] = field(default_factory=list)
    finished: bool = True

    @property
    def passed(self) -> bool:
        """Nothing differs but ties, and no χ² cell rejects (Holm, family false-alarm rate 10⁻³)."""
        lossless = not self.differences and not any(holm(self.p_values, FALSE_ALARM))
        return self.finished and self.compared > 0 and lossless

    def __str__(self) -> str:
        counts = f"{self.identical} of {self.compared} identical"
        apart = f", {len(self.tie_gaps)} ties" if self.tie_gaps else ""
        return f"{self.method} {counts}{apart}" + "".join(f"; {difference}" for difference in self.differences[-1:])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {"compared": self.compared, "identical": self.identical, "ties": len(self.tie_gaps)}
        detail = {"tie_gaps": self.tie_gaps, "p_values": self.p_values, "differences": self.differences}
        unfinished = {} if self.finished else {"finished": False}
        return {"method": self.method, **counts, **detail, "passed": self.passed, **unfinished}


def certify(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    max_new_tokens: int,
    draws: int,
    report: Report,
    backend: str = "measure",
    rows: list[Row] | None = None,
    done: Report | None = None,
) -> list[Row]:
    """A row per method: every sample under every setting, sample i with seed i; χ² for methods that sample drafts.

    Every step drafts as much as it may, whether that pays or not. rows: a list that they are put in from the start, for
    whoever wants to see them when it is broken off. done: is told the rows so far after every sample.
    """
    judge = _Judge(model)
    config = SpeculativeConfig(adaptive=False, backend=backend)
    engines = [SpeculativeVLM(model, processor, config, name) for name in methods]
    rows, ask = [] if rows is None else rows, Conversation(SpeculativeVLM(model, processor, config, "ar"))
    check_prompts(ask, samples, max_new_tokens)
    rows += [Row(name, finished=False) for name in methods]
    for seed, sample in enumerate(samples):
        inputs = ask(sample)
        for setting, options in SETTINGS.items():
            report(f"sample {seed + 1} of {len(samples)}, {setting}")
            kwargs = {**options, "max_new_tokens": max_new_tokens}
            reference = None
            for engine, row in zip(engines, rows, strict=True):
                if engine.drafter.sampled and options["do_sample"]:
                    continue
                if reference is None:
                    reference = _generate(model, inputs, seed, kwargs)
                seen = auxiliary.argument(engine.drafter, "events", [sample.events])
                tokens = engine.generate(**inputs, **seen, **kwargs, seed=seed).tokens
                judge.compare(row, f"sample {seed} ({setting})", inputs, kwargs, seed, tokens, reference)
        if done is not None:
            done(f"{seed + 1} of {len(samples)} samples: {', '.join(map(str, rows))}")
    for engine, row in zip(engines, rows, strict=True):
        if engine.drafter.sampled:
            report(f"χ² of {row.method}, {draws} draws a cell")
            row.p_values = end_to_end_p_values(engine.drafter, draws)
        row.finished = True
    return rows


def audit(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], report: Report, rows: list[Row] | None = None
) -> Row:
    """Another engine's outputs against greedy decoding of this model, by ids, or by text where no ids were given.

    rows: as in `certify`.
    """
    judge, row = _Judge(model), Row("outputs", finished=False)
    _check_outputs(model, processor, samples)
    if rows is not None:
        rows.append(row)
    for number, sample in enumerate(samples):
        report(f"line {number + 1} of {len(samples)}")
        inputs = prompts.prepare(processor, [list(sample.images)], [sample.prompt])
        tokenizer = processor.tokenizer
        if sample.tokens is not None:
            tokens = list(sample.tokens)
        else:
            tokens = tokenizer(sample.answer, add_special_tokens=False).input_ids
        kwargs = {**GREEDY, "max_new_tokens": max(1, len(tokens))}
        reference = _generate(model, inputs, 0, kwargs)
        if sample.tokens is None and tokenizer.decode(reference, skip_special_tokens=True).strip() == sample.answer:
            tokens = reference
        judge.compare(row, f"line {number + 1}", inputs, kwargs, 0, tokens, reference)
    row.finished = True
    return row


def _check_outputs(model: PreTrainedModel, processor: Any, samples: Sequence[Sample]) -> None:
    """UserError that names the line whose prompt is refused, or whose output this model cannot have written."""
    check_prompts(Conversation(SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain"), "ar")), samples, 1)
    size = model.get_input_embeddings().weight.shape[0]
    for sample in samples:
        wrong = next((token for token in sample.tokens or () if not 0 <= token < size), None)
        if wrong is not None:
            raise UserError(f"{sample.where}: token {wrong} is not one of the {size} of this model")


def _generate(model: PreTrainedModel, inputs: dict[str, Any], seed: int, kwargs: dict[str, Any]) -> list[int]:
    """Newly generated ids of `transformers`' own `generate()`."""
    torch.manual_seed(seed)
    return model.generate(**inputs, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()


class _Judge:
    """Decides what a difference is worth, with the target in float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The target in float64, made when the first difference asks for it."""
        return copy.deepcopy(self.model).double()

    def compare(
        self,
        row: Row,
        where: str,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
        seed: int,
        tokens: list[int],
        reference: list[int],
    ) -> None:
        """Books one comparison: identical, tie or difference."""
        row.compared += 1
        if tokens == reference:
            row.identical += 1
            return
        at = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=False)) if a != b), None)
        if at is None:
            row.differences.append(f"{where}: {len(tokens)} tokens, {len(reference)} expected")
            return
        gap = self.gap(inputs, kwargs, seed, reference[:at], tokens[at], reference[at])
        if gap < TIE_GAP:
            row.tie_gaps.append(gap)
        else:
            row.differences.append(f"{where}: token {at} is {tokens[at]}, expected {reference[at]} (gap {gap:.1e})")

    @torch.no_grad()
    def gap(
        self, inputs: dict[str, Any], kwargs: dict[str, Any], seed: int, prefix: list[int], one: int, other: int
    ) -> float:
        """How far apart two tokens are after `prefix`, in what decides between them, from float64 logits.

        Greedy: the processed scores. Sampled: log p - log e, where e are the exponential variates that torch's
        multinomial divides p by (the largest quotient is drawn), replayed from the seed.
        """
        ids = torch.cat([inputs["input_ids"], torch.tensor([prefix], dtype=torch.long)], 1)
        forward = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if isinstance(v, Tensor)}
        forward |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen = self.exact.generate(
            **forward,
            **{**kwargs, "max_new_tokens": 1, "max_length": None},
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = seen.scores[0][0].double()
        if kwargs["do_sample"]:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(len(prefix) + 1):
                variates = torch.empty(1, len(scores)).exponential_(1, generator=generator)
            scores = scores.log_softmax(-1) - variates[0].double().log()
        return abs(float(scores[one] - scores[other]))
