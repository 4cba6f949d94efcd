"""Work overlapped with prefill: what the drafter of a request does while the target reads the prompt.

It makes the tokens that only it sees, and, where it reads prompts by itself, reads this one. Both happen in a thread
beside the target's encoding and prefill, in that order; how much of it these really covered is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.statistics import Statistics
from msd.drafters import Drafter, ReadsAhead
from msd.errors import UserError
from msd.targets.state import State

T = TypeVar("T")


class Hidden:
    """A thread of a request's own, which does one piece of work after another, each begun at once.

    busy: (begin, end) of every piece that was done, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self.busy: list[tuple[float, float]] = []

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Will have what the work gives, or the error that it raises."""
        return self._pool.submit(self._timed, work)

    def end(self) -> None:
        """No more work comes."""
        self._pool.shutdown(wait=False)

    @property
    def seconds(self) -> float:
        """How long the work took that was done."""
        return sum(end - begin for begin, end in self.busy)

    def within(self, begin: float, end: float) -> float:
        """How many of these seconds lie between two moments."""
        return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in self.busy)

    def _timed(self, work: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.busy.append((begin, time.perf_counter()))


Beside = Tensor | Callable[[], Tensor] | None


class Ahead:
    """Begins at once. beside: tokens [B, E, H], zero in rows without any, or a function that makes them."""

    def __init__(self, drafter: Drafter, beside: Beside, statistics: Statistics) -> None:
        self.drafter, self.statistics = drafter, statistics
        self._hidden = Hidden()
        self._beside: Tensor | Future[Tensor] | None = (
            self._hidden.begin(torch.inference_mode()(beside)) if callable(beside) else beside
        )
        self._memory: Future[Any] | None = None
        self._prefills: list[tuple[float, float]] = []

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """The target is at work on the prompt: timed as "prefill"."""
        begin = time.perf_counter()
        with self.statistics.timed("prefill"):
            yield
        self._prefills.append((begin, time.perf_counter()))

    def read(self, lay_out: Callable[[], Layout]) -> None:
        """Lets the drafter read the prompt, if it can; `lay_out` gives it a layout of its own."""
        drafter = self.drafter
        if isinstance(drafter, ReadsAhead):
            layout = lay_out()
            work = torch.inference_mode()(lambda: drafter.ahead(layout, self._tokens(layout.batch)))
            self._memory = self._hidden.begin(work)

    def give(self, state: State) -> None:
        """Waits for all of it, which is then the state's. UserError is the work's own.

        Statistics: "beside", the seconds of the work; "beside_overlap", those of them that passed within prefill;
        "beside_wait", the wait, which is drafting time.
        """
        seconds = self.statistics.seconds
        with self.statistics.timed("beside_wait"):
            state.beside = self._tokens(state.layout.batch)
            if self._memory is not None:
                state.memory = self._memory.result()
        self._hidden.end()
        if not self._hidden.busy:
            del seconds["beside_wait"]
            return
        seconds["draft"] += seconds["beside_wait"]
        seconds["beside"] = self._hidden.seconds
        seconds["beside_overlap"] = sum(self._hidden.within(*span) for span in self._prefills)

    def _tokens(self, rows: int) -> Tensor | None:
        """[B, E, H] for `rows` answers, which may be several to a prompt."""
        made = self._beside.result() if isinstance(self._beside, Future) else self._beside
        if made is None or len(made) == rows:
            return made
        if not len(made) or rows % len(made):
            raise UserError(f"{len(made)} rows of tokens beside {rows} answers; give one for each prompt")
        return made.repeat_interleave(rows // len(made), 0)
