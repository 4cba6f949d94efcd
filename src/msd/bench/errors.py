"""Kinds of words in English answers about pictures: which ones do drafters get wrong?

A lexicon (words.toml) and a few endings, no tagger: closed classes by list (function words, colours, numbers), verbs by
the usual ones of captions and by -ing and -ed, describing words by list and ending; every other word counts as an
object. Words of several kinds have their commonest one in captions ("back" is a function word, "light" describes,
"orange" is a colour). Describing words, marks and what is not English are "other".
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msd.core.modality import FUSION, LANGUAGE, VISION, known
from msd.core.statistics import RowStep

KINDS = ("object", "colour", "number", "verb", "function word", "other")

_LEXICON = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_KNOWN = {name: frozenset(words.split()) for name, words in _LEXICON.items()}
_LISTED = (("function word", "function"), ("colour", "colour"), ("number", "number"), ("verb", "verb"))
_ENDING = re.compile(r"(ly|ful|ous|ive|less|able|ible|ish|est)$")


def kind_of(word: str) -> str:
    """The kind of one word, with what is written around it."""
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
    """The kind of the word that each token's text is a piece of.

    A word begins where a piece does with a space, after one that ends with one, and at marks; what is only marks,
    spaces or nothing (an end token) is "other".
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
