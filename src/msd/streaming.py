"""Runs requests as generators of steps, and streams their text. Reading a stream computes its next step.

Nothing runs between two reads, so an unread stream blocks nothing and costs nothing. One lock for each model lets
requests take turns, also across engines: `generate` holds it for the whole request, a stream for one step.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextStreamer

from msd.core.tree import Step
from msd.errors import UserError
from msd.result import Result

T = TypeVar("T")
Steps = Generator[Step, None, T]  # yields the steps of a request and returns its answer
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_creating = threading.Lock()


def request_lock(model: nn.Module) -> threading.RLock:
    """Returns the lock of a model's requests. It is reentrant, so a callback of a request can make another."""
    with _creating:
        return _locks.setdefault(model, threading.RLock())


def run_to_end(steps: Steps[T], on_step: Callable[[Step], None] | None = None) -> T:
    """Runs all steps of a request, calls `on_step` with each, and returns the answer."""
    while True:
        try:
            step = next(steps)
            if on_step is not None:
                on_step(step)
        except StopIteration as end:
            answer: T = end.value
            return answer


class _Stopped(StoppingCriteria):
    """Stops the generation once `requested` is set."""

    requested = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns whether to stop, [B] bool."""
        return torch.full((input_ids.shape[0],), self.requested, dtype=torch.bool, device=input_ids.device)


class _Pieces(TextStreamer):
    """Collects the pieces of text that later tokens cannot change."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`."""
        if text:
            self.texts.append(text)


class Stream:
    """Yields an answer's text in pieces, which it computes while it is read. Afterwards `result` is the whole answer.

    Every loop over it starts with the first piece: pieces that exist are repeated, then more are computed. Several
    threads may iterate; all get the same pieces. As a context manager it closes itself at the end of the block.
    """

    def __init__(
        self, request: Callable[..., Steps[Any]], lock: threading.RLock, tokenizer: Any, kwargs: dict[str, Any]
    ) -> None:
        self._lock, self._stop, self._pieces = lock, _Stopped(), _Pieces(tokenizer)
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), self._stop])
        self._steps = request(streamer=self._pieces, stopping_criteria=criteria, **kwargs)
        self._result: Result | None = None
        self._over = False

    @property
    def result(self) -> Result:
        """The answer, cut off if the stream was closed. Raises UserError before the end and after a failure."""
        if self._result is None:
            why = "failed; it has no result" if self._over else "has not ended; read it to its end or close() it first"
            raise UserError(f"the stream {why}")
        return self._result

    def __iter__(self) -> Iterator[str]:
        """Yields text as soon as later tokens cannot change it (incomplete characters wait).

        An error of the generation is raised in the loop that computed the step; other loops end without it.
        """
        read = 0
        while True:
            while read < len(self._pieces.texts):
                read += 1
                yield self._pieces.texts[read - 1]
            if self._over:
                return
            self._step(read)

    def close(self) -> None:
        """Ends the generation: waits for a running step, computes one more, and completes `result`.

        Another thread may call it. In a callback of the generation it returns at once; the running step is the last.
        """
        self._stop.requested = True
        with self._lock:
            while not self._over and not self._running():
                self._step(len(self._pieces.texts))

    def __enter__(self) -> Stream:
        """Returns the stream."""
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Closes the stream. After an exception in the block it computes no further step, and there is no `result`."""
        if kind is None:
            self.close()
            return
        with self._lock:
            if not self._running():
                self._steps.close()
                self._over = True

    def _running(self) -> bool:
        """Whether a step of this stream is running; a caller with the lock is then a callback of that step."""
        return inspect.getgeneratorstate(self._steps) == inspect.GEN_RUNNING

    def _step(self, read: int) -> None:
        """Computes a step, unless the stream has ended or has more pieces than the `read` ones of the caller."""
        with self._lock:
            if self._over or len(self._pieces.texts) > read:
                return
            if self._running():
                raise UserError("a callback of a generation cannot read its own stream; read the stream elsewhere")
            try:
                next(self._steps)
            except StopIteration as end:
                self._result, self._over = end.value, True
            except BaseException:
                self._over = True
                raise
