"""The text of an answer while it is generated: pieces that later tokens cannot change, cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer


class AnswerText(TextStreamer):
    """Collects text from tokens. `stopped`: whether one of the `stop` strings has occurred; the text ends before it.

    A piece that could be the beginning of a stop string waits until that is decided.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stop, self.stopped, self._pending, self._pieces = tuple(stop), False, "", list[str]()

    def read(self, tokens: Sequence[int], last: bool = False) -> str:
        """Adds tokens and returns the text that has become certain; `last`: no tokens follow."""
        for token in tokens:
            self.put(torch.tensor([token]))
        if last:
            self.end()
        text, self._pieces = self._pending + "".join(self._pieces), []
        if self.stopped:
            return ""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`."""
        self._pieces.append(text)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
