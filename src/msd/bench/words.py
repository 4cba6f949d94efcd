"""Kinds of words in English answers about pictures: which ones do drafters get wrong?

A lexicon (words.toml) and a few endings, no tagger: closed classes by list (function words, colours, numbers), verbs by
the usual ones of captions and by -ing and -ed, describing words by list and ending; every other word counts as an
object. Words of several kinds have their commonest one in captions ("back" is a function word, "light" describes,
"orange" is a colour). Describing words, marks and what is not English are "other".
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

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
