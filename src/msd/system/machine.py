"""The machine: memory in huge pages, and fewer threads while other processes keep its cores busy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar


def use_huge_pages() -> None:
    """Sets the process up, before its first tensor; a variable that the user has set stays as it is."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator when it first allocates


try:
    import resource
except ImportError:  # Windows counts no preemptions
    resource = None  # type: ignore[assignment]

RATE, FEWEST = 60.0, 5  # preemptions a second, and in all, that mean a busy neighbour; measured: up to 30, and 180
PROBE_SECONDS, STALL_SECONDS = 0.01, 0.002  # how long parallel operators are tried; one that long has been kept waiting
T = TypeVar("T")
PAUSE, LONGEST = 1.0, 30.0  # seconds before more threads are tried again, the first time and at most


class Cores:
    """How many threads passes use now: `most`, or fewer while a neighbour is seen. This one leaves torch's as it is."""

    def resume(self) -> None:
        """Before passes that follow on something else, which says nothing of them."""

    def check(self) -> None:
        """After a pass: fewer threads where it was preempted, more again where nobody disturbs."""


class Shared(Cores):
    """preemptions: how often this process has been preempted so far. free: whether parallel operators run undisturbed
    with that many threads. apply: sets the number of threads. now: seconds.
    """

    def __init__(
        self,
        most: int,
        preemptions: Callable[[], int],
        free: Callable[[int], bool],
        apply: Callable[[int], None] = lambda threads: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.most, self.threads = most, most
        self._preemptions, self._free, self._apply, self._now = preemptions, free, apply, now
        self._count, self._since = preemptions(), now()  # at the end of the last check
        self._changed, self._pause = -LONGEST, PAUSE

    def resume(self) -> None:
        """See `Cores`."""
        self._count, self._since = self._preemptions(), self._now()
        self._raise_if_free()
        self._apply(self.threads)

    def check(self) -> None:
        """See `Cores`."""
        preempted, seconds = self._preemptions() - self._count, self._now() - self._since
        if self.threads == 1 or preempted < max(FEWEST, RATE * seconds):
            self._raise_if_free()
        else:
            soon = self._now() - self._changed < LONGEST
            self._pause = min(2 * self._pause, LONGEST) if soon else PAUSE
            self.threads -= max(1, self.threads // 4)
            self._changed = self._now()
        self._apply(self.threads)
        self._count, self._since = self._preemptions(), self._now()

    def _raise_if_free(self) -> None:
        """All threads again, if a pause is over and they run undisturbed."""
        if self.threads == self.most or self._now() - self._changed < self._pause:
            return
        self._changed = self._now()
        if self._free(self.most):
            self.threads = self.most
        else:
            self._pause = min(2 * self._pause, LONGEST)


_shared: Shared | None = None
_lock, _users = threading.Lock(), 0


def share_cores(on: bool = True) -> None:
    """Lets every engine of this process use fewer threads while other processes keep its cores busy; off with False.

    For programs that do not have their machine to themselves. Only while an answer is being made is torch's number of
    threads changed. Nothing happens where the system does not count preemptions.
    """
    import torch  # here and below, since commands that use no model need not load it

    global _shared
    most = torch.get_num_threads()
    _shared = Shared(most, _preemptions, _free, _use) if on and most > 1 and resource is not None else None


@contextmanager
def watched() -> Iterator[Cores]:
    """The cores for the passes inside; afterwards torch's number of threads is again what the program made it."""
    global _users
    cores = _shared
    if cores is None:
        yield Cores()
        return
    with _lock:
        _users += 1
    cores.resume()
    try:
        yield cores
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _use(cores.most)


def quietly(measure: Callable[[], T]) -> tuple[bool, T]:
    """(whether no other process took our cores meanwhile, as far as the system tells, what `measure` found)."""
    preempted, begin = 0 if resource is None else _preemptions(), time.perf_counter()
    found = measure()
    preempted = 0 if resource is None else _preemptions() - preempted
    return preempted < max(FEWEST, RATE * (time.perf_counter() - begin)), found


def _use(threads: int) -> None:
    """Has torch use that many."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _preemptions() -> int:
    """Involuntary context switches of this process so far, all its threads together."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _free(threads: int) -> bool:
    """Whether small parallel operators run on that many threads for a moment without being kept waiting."""
    import torch

    mine = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, begin = torch.zeros(1 << 17), time.perf_counter()
        x.add_(1)  # wakes the threads
        before = last = time.perf_counter()
        preempted = _preemptions()
        while last - begin < PROBE_SECONDS:
            x.add_(1)
            before, last = last, time.perf_counter()
            if last - before > STALL_SECONDS:
                return False
        return _preemptions() == preempted
    finally:
        torch.set_num_threads(mine)
