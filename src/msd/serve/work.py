"""Work: a computation in the scheduler's thread that is not an answer, such as the gain of an image.

It is a generator that yields after each pass of the target. The scheduler advances it once between two steps, so a
running answer waits for at most one pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

WAITING = 4  # pieces of work that wait or run


@dataclass(eq=False)
class Work:
    """passes: returns the result. receive: gets the result or an exception, once; called in the scheduler's thread."""

    passes: Generator[None, None, Any]
    receive: Callable[[Any], None]
    arrival: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def advance(self, oldest: float) -> bool:
        """Computes the next pass; returns whether the work is over. oldest: arrival before which it is too late."""
        try:
            if self.cancelled or self.arrival < oldest:
                self.passes.close()
                raise TimeoutError
            next(self.passes)
            return False
        except StopIteration as end:
            self._hand(end.value)
        except Exception as error:
            self._hand(error)
        return True

    def _hand(self, outcome: Any) -> None:
        """Calls `receive`; the event loop of a client that has gone may be closed."""
        try:
            self.receive(outcome)
        except RuntimeError:
            self.cancelled = True
