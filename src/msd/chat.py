"""`Chat`: a conversation that reuses the state of its last turn.

The prompt of each turn is the whole conversation in the model's chat template, so its answer equals that of a new
request, even if earlier turns were edited. The target's keys and values for the common prefix of the last prompt and
this one are reused, and so are the vision features of earlier images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from msd.errors import UserError
from msd.inputs import prompts
from msd.result import Result
from msd.streaming import Steps, Stream, run_to_end
from msd.targets import Past


class Chat:
    """One conversation, created by `SpeculativeVLM.chat()`. Not thread-safe.

    messages: all turns so far in `transformers`' format; may be edited between turns. images: the images, videos and
    sounds of all turns, in order. `Result.statistics.num_prefill_rows` counts the prompt rows that a turn computed.
    """

    def __init__(self, answer: Callable[..., Steps[Any]], lock: threading.RLock, processor: Any) -> None:
        self.messages: prompts.Messages = []
        self.images: list[Any] = []
        self._answer, self._lock, self._processor = answer, lock, processor
        self._past = Past()

    def say(self, prompt: str, images: Any = None, **kwargs: Any) -> Result:
        """Answers a turn. images: one image or a list, placed before the prompt.

        kwargs: as for `SpeculativeVLM.generate`. A turn that fails does not change the conversation.
        """
        with self._lock:
            return run_to_end(self._say(prompt, images, **kwargs))

    def stream(self, prompt: str, images: Any = None, **kwargs: Any) -> Stream:
        """Answers a turn like `say`, in text pieces. The turn is added when the stream has ended or is closed."""
        return Stream(partial(self._say, prompt, images), self._lock, self._processor.tokenizer, kwargs)

    def _say(self, prompt: str, images: Any = None, **kwargs: Any) -> Steps[Result]:
        """Runs `say` as a generator of steps, without the lock."""
        prompts.check_text(prompt)
        if "messages" in kwargs or "input_ids" in kwargs:
            raise UserError("a chat writes its own messages; give the turn's prompt and images")
        if kwargs.get("num_return_sequences", 1) != 1:
            raise UserError(f"num_return_sequences={kwargs['num_return_sequences']}: a chat continues with one answer")
        sources = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        loaded = [prompts.load(source) for source in sources]
        parts = [*({"type": prompts.kind(source)} for source in loaded), {"type": "text", "text": prompt}]
        messages: prompts.Messages = [*self.messages, {"role": "user", "content": parts}]
        pictures = [*self.images, *loaded]
        result: Result = yield from self._answer(pictures, messages=messages, past=self._past, **kwargs)
        answer = {"role": "assistant", "content": [{"type": "text", "text": result.text}]}
        self.messages, self.images = [*messages, answer], pictures
        return result

    def reset(self) -> None:
        """Removes all turns."""
        self.messages, self.images, self._past = [], [], Past()
