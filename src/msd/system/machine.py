"""Adapts to the machine: memory in huge pages, and fewer threads while other processes compete for the cores.

Competition is recognised by preemptions (involuntary context switches) of this process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows counts no preemptions
    resource = None  # type: ignore[assignment]

# Competition: at least this many preemptions per second, in a window of at least that many seconds. Measured on two
# cores: 26 to 39 without it, 173 to 216 with it. In 0.05 s chance alone makes it 15 to 158.
RATE, WINDOW = 90.0, 0.5
PROBE_SECONDS, STALL_SECONDS = 0.01, 0.002  # length of the probe for free cores; an operator this slow was preempted
PAUSE, LONGEST = 1.0, 30.0  # seconds until all threads are tried again: at first, at most
# processor time of the calling thread, which other processes disturb least; where it is coarse (Windows), real time
thread_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
T = TypeVar("T")


class Cores:
    """Uses up to `most` threads, and fewer while other processes compete for the cores.

    preemptions: returns how often this process was preempted so far. free: returns whether parallel operators on that
    many threads run without preemption. apply: sets the number of threads. now: returns the time in seconds.
    """

    def __init__(
        self,
        most: int = 1,
        preemptions: Callable[[], int] = lambda: 0,
        free: Callable[[int], bool] = lambda threads: True,
        apply: Callable[[int], None] = lambda threads: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.most, self.threads = most, most
        self._preemptions, self._free, self._apply, self._now = preemptions, free, apply, now
        self._count, self._since = preemptions(), now()  # at the end of the last check
        self._preempted, self._seconds = 0, 0.0  # in the passes of this window
        self._changed, self._pause = -LONGEST, PAUSE

    def resume(self) -> None:
        """Call it before passes that follow other work; preemptions during that work are ignored."""
        self._count, self._since = self._preemptions(), self._now()
        self._raise_if_free()
        self._apply(self.threads)

    def check(self) -> None:
        """Call it after a pass: uses fewer threads after preemptions, and all of them once the cores are free."""
        self._preempted += self._preemptions() - self._count
        self._seconds += self._now() - self._since
        if self._seconds < WINDOW:
            self._raise_if_free()
        else:
            many = self._preempted >= RATE * self._seconds
            self._preempted, self._seconds = 0, 0.0
            if many and self.threads > 1:
                self._lower()
            else:
                self._raise_if_free()
        self._apply(self.threads)
        self._count, self._since = self._preemptions(), self._now()

    def _lower(self) -> None:
        """Uses fewer threads, and waits longer before more are tried if they were tried in vain."""
        soon = self._now() - self._changed < LONGEST
        self._pause = min(2 * self._pause, LONGEST) if soon else PAUSE
        self.threads -= max(1, self.threads // 4)
        self._changed = self._now()

    def _raise_if_free(self) -> None:
        """Returns to all threads if the pause is over and the cores are free."""
        if self.threads == self.most or self._now() - self._changed < self._pause:
            return
        self._changed = self._now()
        if self._free(self.most):
            self.threads, self._preempted, self._seconds = self.most, 0, 0.0
        else:
            self._pause = min(2 * self._pause, LONGEST)


_shared: Cores | None = None
_lock, _users = threading.Lock(), 0


def share_cores(on: bool = True) -> None:
    """Uses fewer threads in this process while other processes compete for the cores; False switches this off.

    It is for programs that share their machine. torch's number of threads changes only while an answer is generated.
    Has no effect on systems that do not count preemptions.
    """
    import torch  # here and below, since commands that use no model need not load it

    global _shared
    most = torch.get_num_threads()
    _shared = Cores(most, _preemptions, _free, _use) if on and most > 1 and resource is not None else None


@contextmanager
def watched() -> Iterator[Cores]:
    """Yields the `Cores` for the passes in the block, and restores torch's number of threads afterwards."""
    global _users
    cores = _shared
    if cores is None:
        yield Cores()  # one thread, which never changes
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
    """Returns (whether `measure` ran without competition, its result); True if the system counts no preemptions.

    The rate is per second of this thread's processor time: a process that waits most of the time is preempted less.
    """
    before, begin = _preemptions(), thread_clock()
    result = measure()
    return _preemptions() - before < RATE * max(WINDOW, thread_clock() - begin), result


def processor() -> str:
    """The processor's name, or its architecture where the system does not give a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> str:
    """All that the system tells about the processors, except their momentary speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(line for line in lines if "MHz" not in line and "mips" not in line.lower())
    except OSError:
        return f"{os.cpu_count()} {platform.machine()} {platform.processor()}"


def return_freed_memory() -> None:
    """Returns memory that the C library keeps after it was freed to the system, where the library is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _use(threads: int) -> None:
    """Has torch use that many."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _preemptions() -> int:
    """Returns the involuntary context switches of all threads of this process so far; 0 if they are not counted."""
    return 0 if resource is None else int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _free(threads: int) -> bool:
    """Runs small parallel operators on that many threads; returns whether none was preempted."""
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
