"""Long answers in which each sentence adds something.

Two captions that overlap least, then what they leave unsaid: how many, which colour, which clothes, what somebody
does, where, and what is not there. A sentence that brings fewer than three new content words (one for a fact) is left
out, so there is nothing to learn about saying a thing twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from facts import Facts, tidy
from words import content

_OPENINGS = ("", "", "", "", "In this picture, ", "In the photo, ")
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
_ACTIONS = ("The {who} is {what}.", "It looks like the {who} is {what}.", "The {who} seems to be {what}.")
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


def _lower_start(sentence: str) -> str | None:
    """The sentence as a continuation, where its first word allows it."""
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
    """A caption, the one that overlaps it least, then what still adds enough."""
    sentences = [s for s in dict.fromkeys(tidy(c) for c in captions) if len(s.split()) > 4] or [tidy(captions[0])]
    meaning = {s: content(s) for s in sentences}
    first = rng.choice(sentences)
    chosen, known = [first], set(meaning[first])
    while len(chosen) < 3:
        rest = [s for s in sentences if not any(_alike(s, c) for c in chosen) and _adds(meaning[s], known, len(chosen))]
        if not rest:
            break
        best = max(rest, key=lambda s: (len(meaning[s] - known) / len(meaning[s]), s))
        chosen.append(best)
        known |= meaning[best]
    return chosen


def _alike(a: str, b: str) -> bool:
    """Whether two sentences begin with the same three words: what a model falls into repeating."""
    return a.lower().split()[:3] == b.lower().split()[:3]


def _adds(meaning: set[str], known: set[str], chosen: int) -> bool:
    """Whether a caption brings enough: half of its content words and at least three are new, four if it is the third."""
    new = len(meaning - known)
    return new >= 2 + chosen and 2 * new >= len(meaning)


def _fact_sentences(facts: Facts, rng: random.Random) -> list[tuple[str, str]]:
    """(kind, sentence) of what could be added, in random order, the absent at the end more often than not."""
    out: list[tuple[str, str]] = []
    if facts.counts:
        n, noun = rng.choice(facts.counts)
        out.append(("count", rng.choice(_COUNTS).format(n=n, noun=noun)))
    for noun, colour in rng.sample(facts.colours, min(2, len(facts.colours))):
        many = noun.endswith("s") and noun not in ("dress", "grass")
        text = rng.choice(_COLOURS).format(
            noun=noun, colour=colour, be="are" if many else "is", it="they" if many else "it"
        )
        out.append(("colour", text))
    if facts.clothes:
        out.append(("clothes", rng.choice(_CLOTHES).format(it=rng.choice(facts.clothes))))
    if facts.actions:
        who, what = rng.choice(facts.actions)
        out.append(("action", rng.choice(_ACTIONS).format(who=who, what=what)))
    if facts.place:
        where, outdoors = facts.place
        out.append(("place", rng.choice(_PLACES).format(where=where)))
        if outdoors is not None:
            out.append(("light", rng.choice(_LIGHT[outdoors])))
    rng.shuffle(out)
    missing = rng.sample(facts.absent, min(len(facts.absent), 3))
    if missing[1:]:
        out.insert(len(out) if rng.random() < 0.7 else rng.randint(0, len(out)), ("absent", _absence(missing[:2], rng)))
    if missing[2:] and len(out) < 4:
        out.append(("absent", _absence(missing[2:], rng)))
    return out


def _absence(missing: Sequence, rng: random.Random) -> str:
    if len(missing) == 1:
        (a,) = missing
        return rng.choice(_ABSENT_ONE).format(a=a.name, A=a.noun.capitalize(), na=a.noun)
    a, b = missing
    return rng.choice(_ABSENT_TWO).format(a=a.name, b=b.name, na=a.noun, nb=b.noun)


def long_answer(captions: Sequence[str], facts: Facts, rng: random.Random, sentences: int = 7) -> str:
    """A detailed description of at most `sentences` sentences, none of which repeats another."""
    chosen = least_overlapping(captions, rng)
    text = [_introduced(chosen[0], rng.choice(_OPENINGS))]
    text += [_introduced(s, rng.choice(_LINKS)) for s in chosen[1:]]
    known = content(" ".join(text))
    said_pairs = " ".join(text).lower()
    for kind, sentence in _fact_sentences(facts, rng):
        if len(text) >= sentences:
            break
        new = content(sentence) - known
        if kind == "colour":
            adds = not _already_coloured(sentence, said_pairs)
        elif kind == "absent":
            adds = True
        else:
            adds = len(
                new - {"total", "count", "number", "outdoor", "seem", "look", "includ", "outfit", "cloth", "somebody"}
            ) >= (2 if kind == "action" else 1)
            adds = adds or kind == "light"
        if adds and not repeats(" ".join([*text, sentence])):
            text.append(sentence)
            known |= content(sentence)
            said_pairs += " " + sentence.lower()
    return " ".join(text)


def repeats(text: str, n: int = 8) -> bool:
    """Whether any run of `n` words occurs twice."""
    w = re.findall(r"[a-z0-9']+", text.lower())
    grams = [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]
    return len(set(grams)) < len(grams)


def _already_coloured(sentence: str, said: str) -> bool:
    """Whether both the noun and the colour of a colour sentence were named already."""
    return content(sentence) - {"colour"} <= content(said)
