"""The certificate of losslessness: each answer is compared with that of `transformers` `generate()`, token by token.

In float32, greedy and same-seed sampled answers must be identical. Matrix products of one row and of many rows round
differently, so two correct computations can differ where two tokens are almost equally good. A first difference counts
as a *tie* if the target in float64 puts the two tokens closer than `TIE_GAP`; any other difference fails. Methods with
sampled candidates draw other tokens with the same seed; a χ² test checks their output distribution instead.

In half precision, rounding changes some greedy answers of `generate()` itself, so identity is not promised. Each method
is compared with a *yardstick*: `generate()` with every prompt in a batch of two. See docs/verification.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from msd.bench.conversation import Conversation, check_prompts
from msd.bench.data import Sample
from msd.bench.timing import until
from msd.certify.chi2 import end_to_end_p_values, rejects
from msd.config import SpeculativeConfig
from msd.drafters import auxiliary
from msd.errors import UserError
from msd.inputs import prompts
from msd.model import SpeculativeVLM

TIE_GAP = 1e-4  # in logits, float32
LARGEST_GAP = 16.0  # in half precision, in roundings of the logit
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
    """The certificate of one method.

    differences: a description of each first difference that is no tie. finished: whether all comparisons have been
    made; an unfinished row has not passed. tokens: of all expected answers; agreeing: of these, the tokens before the
    first difference. relative_gaps: the gap of each first difference, divided by the largest gap of a tie.
    yardstick: in half precision, the comparison of `generate()` with itself.
    """

    method: str
    compared: int = 0
    identical: int = 0
    tie_gaps: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    p_values: list[float] = field(default_factory=list)
    finished: bool = True
    tokens: int = 0
    agreeing: int = 0
    relative_gaps: list[float] = field(default_factory=list)
    yardstick: Row | None = None

    @property
    def passed(self) -> bool:
        """Float32: no difference but ties, and no χ² test rejects (Bonferroni, family-wise false-alarm rate 10⁻³).

        Half precision: no gap above `LARGEST_GAP`, and not significantly more differences that are no ties than the
        yardstick has (Fisher's exact test, one-sided, 10⁻³).
        """
        if not self.finished or not self.compared:
            return False
        if self.yardstick is None:
            return not self.differences and not rejects(self.p_values, FALSE_ALARM)
        counts = [[len(r.differences), r.compared - len(r.differences)] for r in (self, self.yardstick)]
        more = stats.fisher_exact(counts, alternative="greater").pvalue < FALSE_ALARM
        return not more and max(self.relative_gaps, default=0.0) <= LARGEST_GAP

    @property
    def agreeing_share(self) -> float:
        """Share of the expected tokens that precede the first difference of their answer."""
        return self.agreeing / max(1, self.tokens)

    def __str__(self) -> str:
        counts = f"{self.identical} of {self.compared} identical"
        ties = f", {len(self.tie_gaps)} ties" if self.tie_gaps else ""
        return f"{self.method} {counts}{ties}" + "".join(f"; {difference}" for difference in self.differences[-1:])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {"compared": self.compared, "identical": self.identical, "ties": len(self.tie_gaps)}
        shares = {"identical_share": self.identical / max(1, self.compared), "agreeing_share": self.agreeing_share}
        detail = {"tie_gaps": self.tie_gaps, "p_values": self.p_values, "differences": self.differences}
        relative = {"relative_gaps": self.relative_gaps}
        unfinished = {} if self.finished else {"finished": False}
        return {"method": self.method, **counts, **detail, "passed": self.passed, **shares, **relative, **unfinished}


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
    """Certifies `methods` on `samples`; returns one row per method.

    Every sample is answered under every setting, sample i with seed i; methods with sampled drafts also get χ² tests of
    `draws` answers. A model in half precision answers greedily only, because a batch of two draws other random numbers.
    Drafting is not adaptive: every step drafts the maximum.
    rows: a list to which the rows are added at the start, so that they can be shown after an interruption. report: is
    called with the current state, done: with the rows after every sample.
    """
    judge, half = _Judge(model), model.dtype != torch.float32
    config = SpeculativeConfig(adaptive=False, backend=backend)
    engines = [SpeculativeVLM(model, processor, config, name) for name in methods]
    rows, ask = [] if rows is None else rows, Conversation(SpeculativeVLM(model, processor, config, "ar"))
    check_prompts(ask, samples, max_new_tokens)
    yardstick = Row("yardstick", finished=False) if half else None
    rows += [Row(name, finished=False, yardstick=yardstick) for name in methods]
    for seed, sample in enumerate(samples):
        asked = ask.request(sample)
        inputs = asked.inputs()
        for setting, options in ({"greedy": GREEDY} if half else SETTINGS).items():
            report(f"sample {seed + 1} of {len(samples)}, {setting}")
            request = _Request(
                f"sample {seed} ({setting})", inputs, {**options, "max_new_tokens": max_new_tokens}, seed
            )
            reference = None
            for engine, row in zip(engines, rows, strict=True):
                if engine.drafter.sampled and options["do_sample"]:
                    continue
                if reference is None:
                    reference = request.generate(model)
                seen = auxiliary.argument(engine.drafter, "events", [sample.events])
                tokens = engine.generate(**inputs, **seen, request=asked, **request.options, seed=seed).tokens
                judge.compare(row, request, tokens, reference)
            if yardstick is not None and reference is not None:
                judge.compare(yardstick, request, request.generate(model, copies=2), reference)
        if done is not None:
            done(f"{seed + 1} of {len(samples)} samples: {', '.join(map(str, rows))}")
    for engine, row in zip(engines, rows, strict=True):
        if engine.drafter.sampled and not half:
            report(f"χ² of {row.method}, {draws} draws a cell")
            row.p_values = end_to_end_p_values(engine.drafter, draws)
        row.finished = True
    if yardstick is not None:
        yardstick.finished = True
    return rows


def audit(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], report: Report, rows: list[Row] | None = None
) -> Row:
    """Compares another engine's outputs with greedy decoding of this model: by token ids if given, else by text.

    rows: as in `certify`.
    """
    judge, row = _Judge(model), Row("outputs", finished=False)
    _check_outputs(model, processor, samples)
    if rows is not None:
        rows.append(row)
    tokenizer = processor.tokenizer
    for number, sample in enumerate(samples):
        report(f"line {number + 1} of {len(samples)}")
        inputs = prompts.prepare(processor, [list(sample.images)], [sample.prompt])
        if sample.tokens is not None:
            tokens = list(sample.tokens)
        else:
            tokens = tokenizer(sample.answer, add_special_tokens=False).input_ids
        request = _Request(f"line {number + 1}", inputs, {**GREEDY, "max_new_tokens": max(1, len(tokens))}, 0)
        reference = request.generate(model)
        if sample.tokens is None and tokenizer.decode(reference, skip_special_tokens=True).strip() == sample.answer:
            tokens = reference
        judge.compare(row, request, tokens, reference)
    row.finished = True
    return row


def _check_outputs(model: PreTrainedModel, processor: Any, samples: Sequence[Sample]) -> None:
    """Raises UserError for a line whose prompt is refused, or whose token ids are outside the vocabulary."""
    check_prompts(Conversation(SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain"), "ar")), samples, 1)
    size = model.get_input_embeddings().weight.shape[0]
    for sample in samples:
        wrong = next((token for token in sample.tokens or () if not 0 <= token < size), None)
        if wrong is not None:
            raise UserError(f"{sample.where}: token {wrong} is not one of the {size} of this model")


@dataclass(frozen=True)
class _Request:
    """One request of the certificate. where: its description. options: of `generate()`."""

    where: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    seed: int

    def generate(self, model: PreTrainedModel, copies: int = 1) -> list[int]:
        """The new tokens of `transformers` `generate()`, for the first of `copies` identical rows of a batch."""
        inputs = {
            name: torch.cat([value] * copies).to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
            if isinstance(value, Tensor)
        }
        torch.manual_seed(self.seed)
        tokens = model.generate(**inputs, **self.options)[0, inputs["input_ids"].shape[1] :].tolist()
        return until(tokens, model.generation_config.eos_token_id)  # without the padding of a batch


class _Judge:
    """Classifies differences by the gap between two tokens, computed with the target in float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @cached_property
    def exact(self) -> PreTrainedModel:
        """A copy of the target in float64, made for the first difference."""
        return copy.deepcopy(self.model).double()

    def compare(self, row: Row, request: _Request, tokens: list[int], reference: list[int]) -> None:
        """Adds one comparison to `row`: identical, tie or difference."""
        row.compared += 1
        row.tokens += len(reference)
        if tokens == reference:
            row.identical += 1
            row.agreeing += len(reference)
            return
        at = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=False)) if a != b), None)
        row.agreeing += min(len(tokens), len(reference)) if at is None else at
        if at is None:
            row.differences.append(f"{request.where}: {len(tokens)} tokens, {len(reference)} expected")
            row.relative_gaps.append(float("inf"))
            return
        gap, rounding = self.gap(request, reference[:at], tokens[at], reference[at])
        row.relative_gaps.append(gap / rounding)
        if gap < rounding:
            row.tie_gaps.append(gap)
        else:
            wrong = f"token {at} is {tokens[at]}, expected {reference[at]} (gap {gap:.1e})"
            row.differences.append(f"{request.where}: {wrong}")

    @torch.no_grad()
    def gap(self, request: _Request, prefix: list[int], one: int, other: int) -> tuple[float, float]:
        """(gap between two tokens after `prefix`, largest gap of a tie), from float64 logits.

        Greedy: the difference of their processed scores. Sampled: that of log p - log e, where e are the exponential
        variates that torch's multinomial divides p by, replayed from the seed (it draws the largest quotient). The
        largest gap of a tie is `TIE_GAP` in float32; in half precision it is the rounding of the larger score, which
        is its magnitude times the machine epsilon of the dtype.
        """
        inputs, device = request.inputs, self.model.device
        ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_tensor([prefix])], 1)
        forward = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if isinstance(v, Tensor)}
        forward |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = self.exact.generate(
            **{name: value.to(device) for name, value in forward.items()},
            **{**request.options, "max_new_tokens": 1, "max_length": None},
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = output.scores[0][0].double()
        rounding = TIE_GAP
        if self.model.dtype != torch.float32:
            rounding = torch.finfo(self.model.dtype).eps * float(scores[[one, other]].abs().max())
        if request.options["do_sample"]:
            generator = torch.Generator().manual_seed(request.seed)
            for _ in range(len(prefix) + 1):
                variates = torch.empty(1, len(scores)).exponential_(1, generator=generator)
            scores = scores.log_softmax(-1) - variates[0].double().log()
        return abs(float(scores[one] - scores[other])), rounding
