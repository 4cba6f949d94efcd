# ruff: noqa: E501  (tables of words)
"""Derives questions with one-word answers from captions, as COCO-QA does (Ren et al. 2015): "what" replaces a noun.

    A brown dog is chasing a red ball through tall grass.
      What is the brown dog chasing through tall grass?   ball
      What is chasing a red ball through tall grass?      dog
      What is the color of the ball?                      red

Only nouns that are answers in COCO-QA's train split are replaced.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from recipes.reference_vlm.words import COLOURS

_NUMBERS = ("two", "three", "four", "five", "six")
_DETERMINERS = {"a", "an", "the", "some", "his", "her", "their", "its", *_NUMBERS}
_BREAKS = {"in", "on", "at", "with", "and", "of", "to", "from", "for", "by", "into", "over", "through", "near", "while", "as", "is", "are"}  # fmt: skip
_FOLLOWS = _BREAKS | {"next", "under", "behind", "along", "across", "around", "outside", "beside", "during", "that", "which", "who", "up", "down", "out", "off", "onto", "against", "between", "towards", "toward", "has", "have", ","}  # fmt: skip
_PEOPLE = {"man", "woman", "boy", "girl", "person", "people", "men", "women", "child", "children", "kid", "kids", "player", "players", "lady", "boys", "girls"}  # fmt: skip
_UNASKED = {*_NUMBERS, "one", "seven", "eight", "nine", "ten", "outside", "picture", "camera", "photo"}
_RIDDEN = re.compile(r"^((?:a|an|the) (?:[a-z\-]+ ){1,3}?)(is |are )?([a-z]+ing)((?: [a-z]+)?)$")

Cloze = tuple[str, str]


def answer_words(answers: Iterable[str]) -> set[str]:
    """Returns the one-word answers that are neither a colour nor a number."""
    return {a for a in answers if a.isalpha() and a not in COLOURS and a not in _UNASKED}


def clozes(caption: str, nouns: set[str]) -> list[Cloze]:
    """Returns (question, answer) for every noun phrase of the caption whose noun is in `nouns`."""
    words = re.sub(r"[^a-z\- ,']", " ", caption.lower()).replace(",", " , ").split()
    found: list[Cloze] = []
    for at, noun in enumerate(words):
        after = words[at + 1] if at + 1 < len(words) else None
        if noun not in nouns or not (after is None or after in _FOLLOWS or after.endswith("ing")):
            continue
        start = _phrase_start(words, at)
        if start is None:
            continue
        phrase, rest = words[start:at], words[at + 1 :]
        many = noun.endswith("s") and noun not in ("grass", "dress")
        colour = [w for w in phrase if w in COLOURS]
        if len(colour) == 1:
            found.append((f"What is the color of the {noun}?", colour[0]))
        if phrase[:1] and phrase[0] in _NUMBERS and rest:
            found.append(
                (_ended(["how", "many", noun, *(() if rest[0] in ("is", "are") else ("are",)), *rest]), phrase[0])
            )
        if start == 0:
            if noun not in _PEOPLE and len(rest) > 1 and rest[0] not in (",", "and", "with"):
                verb = [] if rest[0] in ("is", "are", "has", "have", "that") else ["are" if many else "is"]
                found.append((_ended(["what", *verb, *rest]), noun))
        elif start > 1 and words[start - 1] != "and":
            found.append((_about_object(words[:start], rest), noun))
    return found


def _phrase_start(words: list[str], at: int) -> int | None:
    """Returns the start of the noun phrase that ends at `at`: a determiner at most four words before, or None."""
    for start in range(at - 1, max(-1, at - 5), -1):
        if words[start] in _DETERMINERS:
            return start
        if words[start] in _BREAKS or words[start] == ",":
            return start + 1 if at - start > 1 and words[start + 1] in COLOURS else None
    return 0 if at == 0 else None


def _about_object(before: list[str], rest: list[str]) -> str:
    """Returns "What is the dog chasing …?" if the words before the noun allow it, else "The dog leaps over what?"."""
    m = _RIDDEN.match(" ".join(before))
    if not m:
        return _ended([*before, "what"])
    who = re.sub(r"^(a|an) ", "the ", m[1]).strip()
    return _ended(["what", (m[2] or "is").strip(), who, m[3], *m[4].split(), *(rest[:6] if rest[:1] != [","] else [])])


def _ended(words: list[str]) -> str:
    text = " ".join(words).replace(" ,", ",").strip(" ,")
    return f"{text[:1].upper()}{text[1:]}?"


def balanced(found: Mapping[str, list[Cloze]]) -> dict[str, float]:
    """Returns a sampling weight for each answer, lower for frequent answers."""
    counts = Counter(answer for of in found.values() for _, answer in of)
    return {answer: count**-0.5 for answer, count in counts.items()}


def draw(found: list[Cloze], weights: Mapping[str, float], count: int, rng: random.Random) -> list[Cloze]:
    """Draws up to `count` distinct questions of a photo; rare answers are preferred."""
    keyed = sorted(set(found), key=lambda c: (rng.random() ** (1 / weights[c[1]]), c), reverse=True)
    out: dict[str, Cloze] = {}
    for question, answer in keyed:
        out.setdefault(question, (question, answer))
    return list(out.values())[:count]
