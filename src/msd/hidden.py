"""Work that is done while the target prefills its prompt.

The drafter's own inputs need nothing of the target's pass, so making them can begin with it: on an accelerator, or with
cores to spare, they cost no time then. What did not fit into the prefill is waited for, and both are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Hidden(Generic[T]):
    """`work()` in a thread of its own, begun at once. seconds: how long it took, known after `result`."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._timed, work)
        self.seconds = 0.0

    def result(self) -> T:
        """What the work gave, or the error it raised; waits for it."""
        try:
            return self._future.result()
        finally:
            self._pool.shutdown(wait=False)

    def _timed(self, work: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds = time.perf_counter() - begin
