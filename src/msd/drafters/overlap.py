"""Runs the drafter's work on a request in a thread while the target encodes its images and prefills the prompt.

The work encodes the auxiliary inputs, and then reads the prompt if the drafter is able to without the target's states.
The statistics record how long it takes and how much of it overlaps with prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.statistics import Statistics
from msd.drafters.base import Drafter, ReadsPrompt
from msd.errors import UserError
from msd.targets.state import State

T = TypeVar("T")
Auxiliary: TypeAlias = Tensor | Callable[[], Tensor] | None
"""Auxiliary tokens [B, E, H], zero in rows without any; or a function that computes them; or None."""


class Prefetch:
    """The drafter's work on one request. It starts to compute the auxiliary tokens at once."""

    def __init__(self, drafter: Drafter, auxiliary: Auxiliary, statistics: Statistics) -> None:
        self.drafter, self.statistics = drafter, statistics
        self._thread = ThreadPoolExecutor(1)
        self._busy: list[tuple[float, float]] = []  # begin and end of each piece of work, `time.perf_counter`
        self._prefills: list[tuple[float, float]] = []  # likewise, of the target's encoding and prefill
        self._auxiliary = self._submit(auxiliary) if callable(auxiliary) else auxiliary
        self._memory: Future[Any] | None = None

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Times its block as "prefill"."""
        begin = time.perf_counter()
        with self.statistics.timed("prefill"):
            yield
        self._prefills.append((begin, time.perf_counter()))

    def read_prompt(self, lay_out: Callable[[], Layout]) -> None:
        """Has a `ReadsPrompt` drafter read the prompt. lay_out: makes a layout for the drafter's thread alone."""
        drafter = self.drafter
        if isinstance(drafter, ReadsPrompt):
            layout = lay_out()
            self._memory = self._submit(lambda: drafter.read_prompt(layout, self._tokens(layout.batch)))

    def finish(self, state: State) -> None:
        """Waits for the work and stores its results in the state; raises what the work raised.

        Seconds in the statistics: "beside" is the time of the work, "beside_overlap" the part of it during prefill,
        "beside_wait" the wait in this method, which counts as drafting.
        """
        seconds = self.statistics.seconds
        with self.statistics.timed("beside_wait"):
            state.auxiliary = self._tokens(state.layout.batch)
            if self._memory is not None:
                state.memory = self._memory.result()
        self._thread.shutdown(wait=False)
        if not self._busy:
            del seconds["beside_wait"]
            return
        seconds["draft"] += seconds["beside_wait"]
        seconds["beside"] = sum(end - begin for begin, end in self._busy)
        seconds["beside_overlap"] = sum(
            max(0.0, min(end, until) - max(begin, since))
            for since, until in self._prefills
            for begin, end in self._busy
        )

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        """Runs the work in the thread, after the work that was submitted before, and times it."""

        @torch.inference_mode()
        def timed() -> T:
            begin = time.perf_counter()
            try:
                return work()
            finally:
                self._busy.append((begin, time.perf_counter()))

        return self._thread.submit(timed)

    def _tokens(self, rows: int) -> Tensor | None:
        """Returns the auxiliary tokens [B, E, H] of `rows` answers; a prompt with several answers repeats its own."""
        tokens = self._auxiliary.result() if isinstance(self._auxiliary, Future) else self._auxiliary
        if tokens is None or len(tokens) == rows:
            return tokens
        if not len(tokens) or rows % len(tokens):
            raise UserError(f"{len(tokens)} rows of auxiliary tokens for {rows} answers; give one for each prompt")
        return tokens.repeat_interleave(rows // len(tokens), 0)
