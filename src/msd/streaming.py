"""Streams: an answer in pieces as it is made, from a thread of its own, stoppable at any step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _Stopped(StoppingCriteria):
    """Stops the generation once its event is set."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B] bool."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Stream:
    """Iterate for text pieces; `result` holds the whole answer afterwards. `close()` ends it within one step."""

    def __init__(self, generate: Callable[..., Any], tokenizer: Any, kwargs: dict[str, Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        self._stop = _Stopped()
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), self._stop])

        def run() -> None:
            try:
                self.result = generate(streamer=self._streamer, stopping_criteria=criteria, **kwargs)
            except BaseException as error:  # handed to the reader, who raises it
                self._error = error
                self._streamer.end()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        """Yields text as soon as it cannot change any more; raises what the generation raised."""
        for piece in self._streamer:
            if piece:
                yield piece
        self.close()

    def close(self) -> None:
        """Ends the generation within one step and waits for it."""
        self._stop.event.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
