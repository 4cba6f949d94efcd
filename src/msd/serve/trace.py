"""Writes the steps of an answer for the request field `msd.trace`: its tokens, and the draft tree that gave them."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from msd.inspect import Pass
from msd.serve.batch import Emission

BROKEN = "\ufffd"  # what an incomplete character is decoded as


class Tracer:
    """Writes the steps of one answer, in order."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode, self._texts = tokenizer.decode, TokenTexts(tokenizer)

    def read(self, emission: Emission) -> dict[str, Any]:
        """Returns the step that emitted these tokens; its `tree` is None for the first token."""
        step = emission.traced
        accepted = 0 if step is None else sum(node.accepted for node in step.nodes)
        kinds = emission.modality[: len(emission.tokens)]
        tokens = [
            {"id": token, "text": self._texts.read(token), "accepted": i < accepted, "modality": kind}
            for i, (token, kind) in enumerate(zip_longest(emission.tokens, kinds))
        ]
        if step is None:
            return {"tokens": tokens, "tree": None}
        seconds = {"draft_seconds": round(step.draft_seconds, 6), "pass_seconds": round(step.score_seconds, 6)}
        return {"tokens": tokens, "tree": self._tree(step), **seconds}

    def _tree(self, step: Pass) -> dict[str, Any]:
        """The draft tree; node i of the list is node i + 1 for `parent`, and the root is node 0."""
        nodes = [
            {
                "text": self._decode([node.token]), "parent": node.parent, "modality": node.modality,
                "p": round(node.p, 4), "q": None if node.q is None else round(node.q, 4), "accepted": node.accepted,
            }
            for node in step.nodes
        ]  # fmt: skip
        return {"root": self._decode([step.root]), "nodes": nodes}


class TokenTexts:
    """The text of each token, special tokens included: all together are the text of the answer.

    A character of several tokens belongs to the last of them; the others have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._before, self._new = list[int](), list[int]()  # whose text has been returned, and whose has not

    def read(self, token: int) -> str:
        """Adds a token and returns its text."""
        self._new.append(token)
        text: str = self._decode(self._before + self._new)
        if text.endswith(BROKEN):
            return ""
        known = len(self._decode(self._before))
        self._before, self._new = self._new, []
        return text[known:]
