"""Computes a row of the results: the figures of one method on the samples of one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from msd.bench.pairwise import ratio_interval
from msd.bench.timing import PLAIN, TRANSFORMERS, Run
from msd.core.statistics import RowStep, Statistics

BY_MODALITY = (  # filled in by `msd.bench.modality`
    "acceptance_by_modality", "coverage_by_modality", "acceptance_by_depth", "positions_by_modality", "errors",
)  # fmt: skip

VLLM = (  # names in vLLM's results
    "mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram", "num_spec_steps", "num_draft_tokens",
    "num_accepted_draft_tokens", "num_spec_tokens",
)  # fmt: skip


def repeating(tokens: Sequence[int], n: int = 8) -> list[bool]:
    """Returns for each token whether it completes an n-gram that occurred earlier in the answer."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(tokens) + 1):
        gram = tuple(tokens[max(0, end - n) : end])
        marks.append(gram in seen)
        if len(gram) == n:
            seen.add(gram)
    return marks


def tau_outside_repeats(answers: Iterable[tuple[Iterable[RowStep], Sequence[int]]], n: int = 8) -> float | None:
    """Returns τ (bonus token included) over the steps that emit no repeated n-gram; None if there is no such step.

    answers: (steps, tokens) of each answer.
    """
    count = emitted = 0
    for steps, tokens in answers:
        marks = repeating(tokens, n)
        for step in steps:
            marks_of_step = marks[step.first : step.first + step.accepted + 1]
            if marks_of_step and not any(marks_of_step):
                count += 1
                emitted += len(marks_of_step)
    return emitted / count if count else None


def row(name: str, task: str, groups: list[int], runs: dict[str, list[Run]], comparable: bool) -> dict[str, Any]:
    """Returns one row. A speedup is a ratio of summed times over the same samples.

    The best plain decoding is the faster one on these samples, ours or the library's.
    groups: indices into each method's list of `runs`. comparable: whether answers must equal the library's; a sampled
    batch shares one generator there, so its answers may differ.
    """
    own, library, plain = ([runs[n][i] for i in groups] for n in (name, TRANSFORMERS, PLAIN))
    total = Statistics()
    for r in own:
        total.add(r.statistics)
    pairs = [pair for a, b in zip(own, library, strict=True) for pair in zip(a.answers, b.answers, strict=True)]
    answers, tokens, seconds = len(pairs), sum(r.tokens for r in own), _seconds(own)
    best = min((PLAIN, TRANSFORMERS), key=lambda n: _seconds([runs[n][i] for i in groups]))
    best_seconds = [runs[best][i].seconds for i in groups]
    parts = {part: total.seconds[part] for part in ("prefill", "draft", "verify", "host")} if total.seconds else {}
    return {
        "method": name,
        "task": task,
        "samples": answers,
        "tokens": tokens,
        "mean_answer_tokens": tokens / answers,
        "speedup_vs_transformers": _seconds(library) / seconds,
        "best_plain": best,
        "speedup_vs_best_plain": sum(best_seconds) / seconds,
        "speedup_vs_best_plain_interval": ratio_interval(best_seconds, [r.seconds for r in own]),
        "speedup_vs_best_plain_paired_median": median(b / r.seconds for b, r in zip(best_seconds, own, strict=True)),
        "speedup_vs_ar": _seconds(plain) / seconds,
        "speedup_vs_ar_interval": ratio_interval([r.seconds for r in plain], [r.seconds for r in own]),
        "speedup_vs_ar_paired_median": median(b.seconds / a.seconds for a, b in zip(own, plain, strict=True)),
        "speedup_warm_vs_ar": _warm_speedup(plain, own),
        "speedup_decode_only": _decode_speedup(plain, own),
        "tokens_per_second": tokens / seconds,
        "target_passes": total.num_spec_steps or None,
        "mean_acceptance_length": total.mean_acceptance_length if total.num_spec_steps else None,
        "tau_outside_repeated_8grams": tau_outside_repeats(row for r in own for row in r.by_row()),
        "tau_without_bonus": total.tau_without_bonus if total.num_spec_steps else None,
        "draft_acceptance_rate": total.draft_acceptance_rate if total.num_spec_steps else None,
        "speculative_decoding": {name: total.as_dict()[name] for name in VLLM} if total.num_draft_tokens else None,
        **dict.fromkeys(BY_MODALITY),
        "divergence": total.as_dict()["divergence"],
        "identical": sum(a == b for a, b in pairs) / answers if comparable else None,
        "seconds": seconds,
        "prefill_s": parts.get("prefill", sum(r.prefill or 0.0 for r in own)),
        "draft_s": parts.get("draft"),
        "verify_s": parts.get("verify"),
        "host_s": parts.get("host"),
        "host_share": parts["host"] / seconds if parts else None,
    }


def _seconds(runs: list[Run]) -> float:
    return sum(r.seconds for r in runs)


def _decode_speedup(plain: list[Run], own: list[Run]) -> float | None:
    """Returns the speedup over plain decoding after prefill; None if any prefill time is unknown."""
    if any(r.prefill is None for r in (*plain, *own)):
        return None
    base, decode = (sum(r.seconds - (r.prefill or 0.0) for r in runs) for runs in (plain, own))
    return base / max(decode, 1e-9)


def _warm_speedup(plain: list[Run], own: list[Run]) -> float | None:
    """Returns the speedup over plain decoding with all images encoded; None if it was not measured."""
    pairs = [(a.warm, b.warm) for a, b in zip(plain, own, strict=True) if a.warm is not None and b.warm is not None]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None
