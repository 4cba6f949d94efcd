"""Composes long answers without repetition from captions and facts.

An answer starts with the captions that overlap least. Facts that they do not mention follow: clothes, colours, counts,
other things, the place, and absent things. A caption with fewer than three new content words is left out, and a fact
without a new one, so the model does not learn to repeat itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from recipes.reference_vlm.facts import Facts, tidy
from recipes.reference_vlm.words import Thing, content, present, words

_OPENINGS = ("", "", "", "", "", "", "In this picture, ", "In the photo, ")
_LINKS = ("", "", "", "Also, ", "In addition, ", "Here, ")
_COUNTS = (
    "There are {n} {noun} in total.",
    "One can count {n} {noun}.",
    "The number of {noun} here is {n}.",
    "In all, {n} {noun} can be seen.",
)
_COLOURS = (
    "The {noun} {be} {colour}.",
    "The colour of the {noun} is {colour}.",
    "As for the {noun}, {it} {be} {colour}.",
)
_CLOTHES = (
    "Somebody is wearing {it}.",
    "One of them wears {it}.",
    "The clothes include {it}.",
    "The outfit includes {it}.",
)
_SEEN = ("One can also see {it}.", "There is also {it}.", "{It} can be seen as well.")
_PLACES = (
    "The scene takes place {where}.",
    "All of this happens {where}.",
    "It was taken {where}.",
    "The setting is {where}.",
)
_LIGHT = {
    True: ("This is an outdoor scene.", "It was photographed outdoors."),
    False: ("This is an indoor scene.", "It was photographed indoors."),
}
_ABSENT_TWO = (
    "There is no {a} or {b} here.",
    "Neither {na} nor {nb} can be seen.",
    "No {a} and no {b} appear in the picture.",
    "One does not see {na} or {nb}.",
)
_ABSENT_ONE = (
    "There is no {a} in sight.",
    "No {a} can be seen.",
    "{A} is not part of the picture.",
    "Nothing suggests {na} nearby.",
)


_FRAME = content(" ".join((*_COUNTS, *_COLOURS, *_CLOTHES, *_SEEN, *_PLACES)))  # words of the templates


def _lower_start(sentence: str) -> str | None:
    """Returns the sentence with a lower-case start, or None if its first word may be a name."""
    first = sentence.split()[0]
    return (
        sentence[0].lower() + sentence[1:]
        if first in ("A", "An", "The", "Two", "Three", "Four", "Several", "Some", "Many", "One")
        else None
    )


def _introduced(sentence: str, prefix: str) -> str:
    if not prefix:
        return sentence
    continued = _lower_start(sentence)
    return prefix + continued if continued else sentence


def least_overlapping(captions: Sequence[str], rng: random.Random) -> list[str]:
    """Returns a random caption, then up to two more that overlap least and add enough new words."""
    sentences = [s for s in dict.fromkeys(tidy(c) for c in captions) if len(s.split()) > 4] or [tidy(captions[0])]
    meaning = {s: content(s) for s in sentences}
    first = rng.choice(sentences)
    chosen, known = [first], set(meaning[first])
    while len(chosen) < 3:
        rest = [s for s in sentences if not _alike(s, chosen) and _adds(meaning[s], known, len(chosen))]
        if not rest:
            break
        best = max(rest, key=lambda s: (len(meaning[s] - known) / len(meaning[s]), s))
        chosen.append(best)
        known |= meaning[best]
    return chosen


def _alike(sentence: str, chosen: Sequence[str]) -> bool:
    """Returns whether a caption starts like a chosen one or repeats one of its phrases."""
    starts = [c.lower().split()[:3] for c in chosen]
    return sentence.lower().split()[:3] in starts or repeats(" ".join([*chosen, sentence]))


def _adds(meaning: set[str], known: set[str], chosen: int) -> bool:
    """Returns whether at least half of a caption's content words are new, and three of them (four for the third)."""
    new = len(meaning - known)
    return new >= 2 + chosen and 2 * new >= len(meaning)


def _fact_sentences(facts: Facts, text: str, rng: random.Random) -> list[tuple[str, str]]:
    """Returns (kind, sentence) of the facts that could be added, nearly always in the same order."""
    out: list[tuple[str, str]] = []
    if facts.clothes:
        out.append(("clothes", rng.choice(_CLOTHES).format(it=rng.choice(facts.clothes))))
    for noun, colour in rng.sample(facts.colours, min(2, len(facts.colours))):
        many = noun.endswith("s") and noun not in ("dress", "grass")
        be, it = ("are", "they") if many else ("is", "it")
        out.append(("colour", rng.choice(_COLOURS).format(noun=noun, colour=colour, be=be, it=it)))
    if facts.counts:
        n, noun = rng.choice(facts.counts)
        out.append(("count", rng.choice(_COUNTS).format(n=n, noun=noun)))
    unmentioned = [t for t in facts.present if t not in present(words([text]))]
    if unmentioned:
        it = rng.choice(unmentioned).noun
        out.append(("seen", rng.choice(_SEEN).format(it=it, It=it[0].upper() + it[1:])))
    if facts.place:
        where, outdoors = facts.place
        out.append(("place", rng.choice(_PLACES).format(where=where)))
        if outdoors is not None:
            out.append(("light", rng.choice(_LIGHT[outdoors])))
    if len(out) > 1 and rng.random() < 0.3:
        i = rng.randrange(len(out) - 1)
        out[i], out[i + 1] = out[i + 1], out[i]
    missing = rng.sample(facts.absent, min(len(facts.absent), 3))
    if missing[1:]:
        out.append(("absent", _absence(missing[:2], rng)))
    if missing[2:] and len(out) < 5:
        out.append(("absent", _absence(missing[2:], rng)))
    return out


def _absence(missing: Sequence[Thing], rng: random.Random) -> str:
    if len(missing) == 1:
        (a,) = missing
        return rng.choice(_ABSENT_ONE).format(a=a.name, A=a.noun.capitalize(), na=a.noun)
    a, b = missing
    return rng.choice(_ABSENT_TWO).format(a=a.name, b=b.name, na=a.noun, nb=b.noun)


def long_answer(captions: Sequence[str], facts: Facts, rng: random.Random, sentences: int = 8) -> str:
    """Returns a detailed description of at most `sentences` sentences, none of which repeats another."""
    chosen = least_overlapping(captions, rng)
    text = [_introduced(chosen[0], rng.choice(_OPENINGS))]
    text += [_introduced(s, rng.choice(_LINKS)) for s in chosen[1:]]
    for kind, sentence in _fact_sentences(facts, " ".join(text), rng):
        known = content(" ".join(text))
        new = content(sentence) - known - _FRAME
        adds = kind in ("absent", "light") or bool(new)
        if len(text) < sentences and adds and not repeats(" ".join([*text, sentence])):
            text.append(sentence)
    return " ".join(text)


def repeats(text: str, n: int = 4) -> bool:
    """Returns whether any sequence of `n` words occurs twice."""
    w = re.findall(r"[a-z0-9']+", text.lower())
    grams = [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]
    return len(set(grams)) < len(grams)
