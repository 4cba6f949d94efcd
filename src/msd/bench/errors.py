"""The error pattern of a drafter: which drafted positions are rejected, by modality, depth and kind of word.

Of top-1 chains, as acceptance is (`msd.bench.modal`): accepted positions and the first rejected one of every draft
count, each once. The word is the target's at that position, the one that the draft missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from msd.bench.words import KINDS
from msd.modality import FUSION, LANGUAGE, VISION, known
from msd.statistics import RowStep

FIRST = (VISION, LANGUAGE, FUSION)  # of the order in which modalities are told
Marked = tuple[
    Iterable[RowStep], Sequence[int], Sequence[str]
]  # an answer's steps; modality ids and kinds of its tokens


def pattern(chains: Iterable[Marked]) -> list[dict[str, Any]]:
    """[{"modality", "depth", "word", "drafted", "rejected"}, …] in a fixed order, where anything was drafted."""
    drafted: Counter[tuple[str, int, str]] = Counter()
    rejected: Counter[tuple[str, int, str]] = Counter()
    names = known()
    for steps, labels, kinds in chains:
        for step in steps:
            for level in range(min(step.accepted + 1, step.levels)):
                at = step.first + level
                if at < min(len(labels), len(kinds)):
                    place = names[labels[at]].name, level + 1, kinds[at]
                    drafted[place] += 1
                    rejected[place] += level == step.accepted
    return [
        {"modality": m, "depth": d, "word": w, "drafted": n, "rejected": rejected[m, d, w]}
        for (m, d, w), n in sorted(drafted.items(), key=lambda item: _order(item[0]))
    ]


def _order(place: tuple[str, int, str]) -> tuple[int, int, int]:
    modality, depth, word = place
    names = [m.name for m in (*FIRST, *known())]
    return names.index(modality), depth, KINDS.index(word)


def told(patterns: Iterable[list[dict[str, Any]]]) -> list[str]:
    """Modalities that occur in the patterns: vision, language and fusion before others."""
    seen = {error["modality"] for errors in patterns for error in errors}
    return [name for name in dict.fromkeys(m.name for m in (*FIRST, *known())) if name in seen]


def rate(errors: Iterable[dict[str, Any]], **which: Any) -> tuple[int, int]:
    """(rejected, drafted) positions whose fields are as given, as in `rate(errors, modality="vision", depth=1)`."""
    some = [e for e in errors if all(e[name] == value for name, value in which.items())]
    return sum(e["rejected"] for e in some), sum(e["drafted"] for e in some)


def groups(results: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Title -> (name, fields) of what rejections are told by: modality, depth, word."""
    every = [errors for _, errors in methods(results)]
    deepest = max((e["depth"] for errors in every for e in errors), default=0)
    return {
        "modality": [(m, {"modality": m}) for m in told(every)],
        "depth": [(f"depth {d}", {"depth": d}) for d in range(1, deepest + 1)],
        "word": [(w, {"word": w}) for w in KINDS],
    }


def methods(results: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(method, its pattern over all tasks) where it was measured."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("errors")]
    return [(r["method"], r["errors"]) for r in rows]


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows): rejected share of drafted positions per method; then of each kind of word by modality."""
    measured = methods(results)
    if not measured:
        return []
    columns = [column for group in groups(results).values() for column in group]
    rows = [[name, *(_cell(*rate(errors, **which)) for _, which in columns)] for name, errors in measured]
    found = [("Rejected drafts, of those drafted (%)", ["method", *(name for name, _ in columns)], rows)]
    crossed = [
        [f"{name}, {modality}", *(_cell(*rate(errors, modality=modality, word=w)) for w in KINDS)]
        for name, errors in measured
        for modality in told([errors])
    ]
    return [*found, ("Rejected drafts by kind of word and modality (%)", ["method", *KINDS], crossed)]


def _cell(rejected: int, drafted: int) -> str:
    """Such as "31 (of 120)"."""
    return f"{100 * rejected / drafted:.0f} (of {drafted})" if drafted else "–"
