"""Work that is done while the target prefills its prompt.

The drafter's own inputs need nothing of the target's pass, so making them can begin with it: on an accelerator, or with
cores to spare, they cost no time then. What did not fit into the prefill is waited for, and both are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
