"""Mean acceptance length where the answer does not repeat itself: a looping target flatters every drafter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msd.core.statistics import RowStep


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
