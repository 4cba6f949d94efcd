"""Requests in steps, and streams: whoever wants the next piece of an answer has the next step computed.

Nothing runs between steps: a stream that is left alone holds up nobody and costs nothing. Requests of one model take
turns, whichever engines they were made to, step by step for streams and whole otherwise.
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
Steps = Generator[Step, None, T]  # a request that computes one step at a time and returns its answer
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_creating = threading.Lock()


def request_lock(model: nn.Module) -> threading.RLock:
    """The lock of a model's requests. The thread that has it may make another, from a callback of the first one."""
    with _creating:
        return _locks.setdefault(model, threading.RLock())


def finished(steps: Steps[T], read: Callable[[Step], None] | None = None) -> T:
    """The answer of a request, all steps in one go, each of them shown to `read`."""
    while True:
        try:
            step = next(steps)
            if read is not None:
                read(step)
        except StopIteration as end:
            answer: T = end.value
            return answer


class _Stopped(StoppingCriteria):
    """Stops the generation once `asked`."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B] bool."""
        return torch.full((input_ids.shape[0],), self.asked, dtype=torch.bool, device=input_ids.device)


class _Pieces(TextStreamer):
    """Keeps the text that can't change any more."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`."""
        if text:
            self.texts.append(text)


class Stream:
    """Iterate for text pieces; `result` is the whole answer afterwards. `close()` ends it within one step.

    Every iteration begins with the first piece: those made already come again. One broken off can be gone on with, or
    left as it is. For several threads: they read the same pieces. As a context manager it closes itself.
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
        """The answer, as far as it was made; UserError while it is being made, or when making it failed."""
        if self._result is None:
            why = "failed; it has no result" if self._over else "has not ended; read it to its end or close() it first"
            raise UserError(f"the stream {why}")
        return self._result

    def __iter__(self) -> Iterator[str]:
        """Yields text as soon as it cannot change any more; raises what the generation raises, once."""
        read = 0
        while True:
            while read < len(self._pieces.texts):
                read += 1
                yield self._pieces.texts[read - 1]
            if self._over:
                return
            self._step(read)

    def close(self) -> None:
        """Ends the generation within one step, also from another thread, or from a callback of its own."""
        self._stop.asked = True
        with self._lock:
            while not self._over and not self._inside():
                self._step(len(self._pieces.texts))

    def __enter__(self) -> Stream:
        """Itself."""
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Closes it; where the block raised, nothing more is computed."""
        if kind is None:
            self.close()
            return
        with self._lock:
            if not self._inside():
                self._steps.close()
                self._over = True

    def _inside(self) -> bool:
        """Whether whoever has the turn was called by a step of this stream."""
        return inspect.getgeneratorstate(self._steps) == inspect.GEN_RUNNING

    def _step(self, read: int) -> None:
        """One step, unless another reader had more than `read` pieces made in the meantime."""
        with self._lock:
            if self._over or len(self._pieces.texts) > read:
                return
            if self._inside():
                raise UserError("a stream cannot be read by what its own generation calls; read its pieces elsewhere")
            try:
                next(self._steps)
            except StopIteration as end:
                self._result, self._over = end.value, True
            except BaseException:
                self._over = True
                raise
