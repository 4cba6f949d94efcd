"""A row of a benchmark's table: what one method did on the samples of one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from msd.bench.pairwise import ratio_interval
from msd.bench.timing import PLAIN, TRANSFORMERS, Run
from msd.core.statistics import RowStep, Statistics


def repeating(tokens: Sequence[int], n: int = 8) -> list[bool]:
    """For each token of an answer, whether it completes a run of `n` tokens that occurred earlier in it."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(tokens) + 1):
        gram = tuple(tokens[end - n : end]) if end >= n else None
        marks.append(gram in seen)
        if gram is not None:
            seen.add(gram)
    return marks


def tau_outside_repeats(answers: Iterable[tuple[Iterable[RowStep], Sequence[int]]], n: int = 8) -> float | None:
    """τ (bonus included) over the steps that emit no repeating token; None when there is none.

    answers: the steps of each answer and its tokens, one row each.
    """
    steps = emitted = 0
    for taken, tokens in answers:
        marks = repeating(tokens, n)
        for step in taken:
            of_step = marks[step.first : step.first + step.accepted + 1]
            if of_step and not any(of_step):
                steps += 1
                emitted += len(of_step)
    return emitted / steps if steps else None


def row(name: str, task: str, chosen: list[int], runs: dict[str, list[Run]], comparable: bool) -> dict[str, Any]:
    """One row of the table. Speedups are ratios of summed times over the same samples.

    comparable: whether the library's answers must be the same; of a sampled batch it shares one generator.
    """
    mine, theirs, plain = ([runs[n][i] for i in chosen] for n in (name, TRANSFORMERS, PLAIN))
    total = Statistics()
    for r in mine:
        total.add(r.statistics)

    def seconds(answers: list[Run]) -> float:
        return sum(r.seconds for r in answers)

    def decoding(answers: list[Run]) -> float | None:
        """Without prefill; None where that is not known."""
        parts = [r.seconds - r.prefill for r in answers if r.prefill is not None]
        return sum(parts) if len(parts) == len(answers) else None

    base, own = decoding(plain), decoding(mine)
    # at temperature 0 every method must equal plain greedy decoding by the library
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a.answers, b.answers, strict=True)]
    answers = len(pairs)
    split = {part: total.seconds[part] for part in ("prefill", "draft", "verify", "host")} if total.seconds else {}
    return {
        "method": name,
        "task": task,
        "samples": answers,
        "tokens": sum(r.tokens for r in mine),
        "mean_answer_tokens": sum(r.tokens for r in mine) / answers,
        "speedup_vs_transformers": seconds(theirs) / seconds(mine),
        "speedup_vs_ar": seconds(plain) / seconds(mine),
        "speedup_vs_ar_interval": ratio_interval([r.seconds for r in plain], [r.seconds for r in mine]),
        "speedup_vs_ar_paired_median": median(b.seconds / a.seconds for a, b in zip(mine, plain, strict=True)),
        "speedup_warm_vs_ar": _warm(plain, mine),
        "speedup_decode_only": None if base is None or own is None else base / max(own, 1e-9),
        "tokens_per_second": sum(r.tokens for r in mine) / seconds(mine),
        "mean_acceptance_length": total.mean_acceptance_length if total.num_spec_steps else None,
        "tau_outside_repeated_8grams": tau_outside_repeats(row for r in mine for row in r.by_row()),
        "tau_without_bonus": total.tau_without_bonus if total.num_spec_steps else None,
        "draft_acceptance_rate": total.draft_acceptance_rate if total.num_spec_steps else None,
        "acceptance_by_modality": None,
        "coverage_by_modality": None,
        "acceptance_by_depth": None,
        "positions_by_modality": None,
        "errors": None,
        "divergence": total.as_dict()["divergence"],
        "identical": sum(a == b for a, b in pairs) / answers if comparable else None,
        "seconds": seconds(mine),
        "prefill_s": split.get("prefill", sum(r.prefill or 0.0 for r in mine)),
        "draft_s": split.get("draft"),
        "verify_s": split.get("verify"),
        "host_s": split.get("host"),
        "host_share": split["host"] / seconds(mine) if split else None,
    }


def _warm(plain: list[Run], mine: list[Run]) -> float | None:
    """The speedup over plain decoding when both have the photos encoded; None where it was not measured."""
    pairs = [(a.warm, b.warm) for a, b in zip(plain, mine, strict=True) if a.warm is not None and b.warm is not None]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None
