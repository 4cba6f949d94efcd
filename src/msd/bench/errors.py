"""Counts which drafts the target rejects: by modality, by depth in the draft, and by kind of word.

Kinds of words come from a lexicon (errors.toml) and a few endings, without a tagger, for English answers about images.
Function words, colours and numbers are listed. Verbs are the usual verbs of captions and words in -ing and -ed.
Descriptive words, punctuation and other languages are "other". Every remaining word is an "object". A word of several
kinds has the kind that is most frequent in captions: "back" is a function word, "orange" a colour.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msd.core.modality import FUSION, LANGUAGE, VISION, known
from msd.core.statistics import RowStep

KINDS = ("object", "colour", "number", "verb", "function word", "other")
_LEXICON = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_KNOWN = {name: frozenset(words.split()) for name, words in _LEXICON.items()}
_LISTED = (("function word", "function"), ("colour", "colour"), ("number", "number"), ("verb", "verb"))
_ENDING = re.compile(r"(ly|ful|ous|ive|less|able|ible|ish|est)$")

# an answer: its steps, and the modality id and kind of word of each token
LabelledAnswer = tuple[Iterable[RowStep], Sequence[int], Sequence[str]]


def kind_of(word: str) -> str:
    """Returns the kind of one word; punctuation around it is ignored."""
    plain = word.strip().strip(".,;:!?\"'()[]*#-“”’").lower()
    plain = plain.removesuffix("'s").removesuffix("’s")
    if re.fullmatch(r"\d+([.,:/]\d+)*(st|nd|rd|th|s|%)?", plain):
        return "number"
    if not re.fullmatch(r"[a-z][a-z'’-]*", plain):
        return "other"
    for kind, name in _LISTED:
        if plain in _KNOWN[name]:
            return kind
    if plain in _KNOWN["describing"] or (len(plain) > 4 and _ENDING.search(plain)):
        return "other"
    if len(plain) > 4 and plain.endswith(("ing", "ed")) and plain not in _KNOWN["noun"]:
        return "verb"
    return "object"


def kinds_of(pieces: Sequence[str]) -> list[str]:
    """Returns for each token's text the kind of the word that it belongs to.

    A word begins at a space or a punctuation mark. A token without letters or digits, such as an end token, is "other".
    """
    word_of, words = [], [""]
    for piece in pieces:
        marks = not re.search(r"\w", piece)
        if words[-1] and (marks or piece[:1].isspace() or words[-1][-1:].isspace() or not re.search(r"\w", words[-1])):
            words.append("")
        words[-1] += piece
        word_of.append(len(words) - 1)
        if marks and piece:
            words.append("")
    kinds = [kind_of(word) for word in words]
    return [kinds[i] for i in word_of]


def drafted_positions(steps: Iterable[RowStep], count: int) -> Iterator[tuple[int, int, bool]]:
    """Yields (position in the answer, depth in the draft, accepted) of drafted positions below `count`.

    Accepted drafts and the first rejected one of each step count; drafts below a rejection do not, so that no position
    counts twice. Depth 1 is the first drafted token.
    """
    for step in steps:
        for level in range(min(step.accepted + 1, step.levels)):
            if step.first + level < count:
                yield step.first + level, level + 1, level < step.accepted


def pattern(answers: Iterable[LabelledAnswer]) -> list[dict[str, Any]]:
    """Counts drafted and rejected positions of draft chains.

    Returns [{"modality", "depth", "word", "drafted", "rejected"}, …] in a fixed order, without empty entries.
    """
    drafted: Counter[tuple[str, int, str]] = Counter()
    rejected: Counter[tuple[str, int, str]] = Counter()
    names = known()
    for steps, labels, kinds in answers:
        for position, depth, accepted in drafted_positions(steps, min(len(labels), len(kinds))):
            key = names[labels[position]].name, depth, kinds[position]
            drafted[key] += 1
            rejected[key] += not accepted
    order = _modality_names()
    keys = sorted(drafted, key=lambda key: (order.index(key[0]), key[1], KINDS.index(key[2])))
    return [
        {"modality": m, "depth": d, "word": w, "drafted": drafted[m, d, w], "rejected": rejected[m, d, w]}
        for m, d, w in keys
    ]


def _modality_names() -> list[str]:
    """Returns the names of all modalities: vision, language and fusion first."""
    return list(dict.fromkeys(m.name for m in (VISION, LANGUAGE, FUSION, *known())))


def modalities(patterns: Iterable[list[dict[str, Any]]]) -> list[str]:
    """Returns the names of the modalities that occur in the patterns."""
    seen = {error["modality"] for errors in patterns for error in errors}
    return [name for name in _modality_names() if name in seen]


def rate(errors: Iterable[dict[str, Any]], **fields: Any) -> tuple[int, int]:
    """Returns (rejected, drafted) positions with these fields, as in `rate(errors, modality="vision", depth=1)`."""
    some = [e for e in errors if all(e[name] == value for name, value in fields.items())]
    return sum(e["rejected"] for e in some), sum(e["drafted"] for e in some)


def groups(results: dict[str, Any]) -> list[list[tuple[str, dict[str, Any]]]]:
    """Returns three groups of columns, (name, fields): by modality, by depth and by kind of word."""
    patterns = [errors for _, errors in methods(results)]
    deepest = max((e["depth"] for errors in patterns for e in errors), default=0)
    return [
        [(m, {"modality": m}) for m in modalities(patterns)],
        [(f"depth {d}", {"depth": d}) for d in range(1, deepest + 1)],
        [(w, {"word": w}) for w in KINDS],
    ]


def methods(results: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns (method, its pattern over all tasks) of the methods with a measured pattern."""
    rows = [r for r in results["rows"] if r["task"] == "all" and r.get("errors")]
    return [(r["method"], r["errors"]) for r in rows]


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns two tables of rejection rates: per method, and per method, modality and kind of word."""
    measured = methods(results)
    if not measured:
        return []
    columns = [column for group in groups(results) for column in group]
    rows = [[name, *(_cell(*rate(errors, **fields)) for _, fields in columns)] for name, errors in measured]
    crossed = [
        [f"{name}, {modality}", *(_cell(*rate(errors, modality=modality, word=w)) for w in KINDS)]
        for name, errors in measured
        for modality in modalities([errors])
    ]
    return [
        ("Rejected drafts, of those drafted (%)", ["method", *(name for name, _ in columns)], rows),
        ("Rejected drafts by kind of word and modality (%)", ["method", *KINDS], crossed),
    ]


def _cell(rejected: int, drafted: int) -> str:
    """Formats a rate, such as "31 (of 120)"."""
    return f"{100 * rejected / drafted:.0f} (of {drafted})" if drafted else "–"
