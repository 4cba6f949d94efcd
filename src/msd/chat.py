"""Chat: a conversation whose turns compute only what is new.

Every turn asks with the whole conversation, as the model's chat template writes it, so an answer is that of a fresh
request, whatever was said or changed before. What it shares with the last turn is not computed again: the target's keys
and values up to where the prompts part, and the features of pictures shown before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from msd.errors import UserError
from msd.inputs import prompts
from msd.result import Result
from msd.streaming import Steps, Stream, finished
from msd.targets import Past


class Chat:
    """One conversation; `SpeculativeVLM.chat()` makes it. Not for use by several threads at once.

    messages: all turns so far in `transformers`' format; may be changed between turns. images: those they place, in
    order, with videos and sounds among them. A turn's `Result.statistics.num_prefill_rows` tells how many rows of its
    prompt were computed.
    """

    def __init__(self, answer: Callable[..., Steps[Any]], lock: threading.RLock, processor: Any) -> None:
        self.messages: prompts.Messages = []
        self.images: list[Any] = []
        self._answer, self._lock, self._processor = answer, lock, processor
        self._past = Past()

    def say(self, prompt: str, images: Any = None, **kwargs: Any) -> Result:
        """The answer to a turn, `images` (one source or a list) standing before its words.

        kwargs: as for `SpeculativeVLM.generate`. A turn that fails leaves the conversation as it was.
        """
        with self._lock:
            return finished(self._say(prompt, images, **kwargs))

    def stream(self, prompt: str, images: Any = None, **kwargs: Any) -> Stream:
        """As `say`, in text pieces: iterate over it; the turn counts once it ended or was closed."""
        return Stream(partial(self._say, prompt, images), self._lock, self._processor.tokenizer, kwargs)

    def _say(self, prompt: str, images: Any = None, **kwargs: Any) -> Steps[Result]:
        """A turn, step by step."""
        prompts.check_text(prompt)
        if "messages" in kwargs or "input_ids" in kwargs:
            raise UserError("a chat writes its own messages; give the turn's prompt and images")
        if kwargs.get("num_return_sequences", 1) != 1:
            raise UserError(f"num_return_sequences={kwargs['num_return_sequences']}: a chat goes on with one answer")
        shown = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        loaded = [prompts.load(source) for source in shown]
        parts = [*({"type": prompts.kind(source)} for source in loaded), {"type": "text", "text": prompt}]
        asked: prompts.Messages = [*self.messages, {"role": "user", "content": parts}]
        pictures = [*self.images, *loaded]
        result: Result = yield from self._answer(pictures, messages=asked, past=self._past, **kwargs)
        answer = {"role": "assistant", "content": [{"type": "text", "text": result.text}]}
        self.messages, self.images = [*asked, answer], pictures
        return result

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages, self.images, self._past = [], [], Past()
