"""Scheduler: runs the model in one thread, and decides which requests are decoded together.

Requests wait in a bounded queue, first come, first served. Between two steps of the batch, cancelled and late requests
leave, and waiting ones are prefilled and join: one at a time while answers are being decoded, so a running answer waits
for at most one prompt per step. A request joins if a row is free and its keys and values fit the memory.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from msd.decode import Engine
from msd.errors import UserError
from msd.model import Prefilled, SpeculativeVLM
from msd.serve.batch import Batch, Emission
from msd.serve.prefixes import Prefixes
from msd.serve.work import WAITING, Work
from msd.streaming import request_lock

log = logging.getLogger(__name__)
CANCELLED, LATE = "cancelled", "deadline"  # besides the reasons of `msd.result.Result.finish`
RECENT = 32  # requests in the running median of seconds
IDLE_SECONDS = 0.5  # between two looks at the deadlines of an idle scheduler


@dataclass(frozen=True)
class Limits:
    """What the scheduler admits.

    rows: requests decoded together. waiting: requests in the queue. cache_bytes: of keys and values of all rows.
    seconds: after which a request ends, from its arrival; it keeps the tokens that it has. prefixes: prompts whose keys
    and values are kept for later prompts that begin in the same way, and their largest number of bytes.
    """

    rows: int = 16
    waiting: int = 64
    cache_bytes: int = 2 * 1000**3
    seconds: float = 300.0
    prefixes: int = 4
    prefix_bytes: int = 500 * 1000**2


class QueueFullError(Exception):
    """The queue is full. retry_after: seconds after which a place is likely to be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One request: a prompt with one answer.

    prepare: returns the processor's output; it runs in the scheduler's thread. options: of `generate()`. receive: gets
    every `Emission`, and at the end None or an exception; called in the scheduler's thread, it must not block.
    seed: None for a random one. engine: another one than the server's; None for that. drafts: whether to draft for it.
    trace: emissions have their trees. inputs: the processor's output, once prepared.
    """

    prepare: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    receive: Callable[[Emission | Exception | None], None]
    seed: int | None = None
    engine: Engine | None = None
    drafts: bool = True
    trace: bool = False
    arrival: float = field(default_factory=time.monotonic)
    joined: float | None = None
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cancelled: bool = False
    done: bool = False
    inputs: dict[str, Any] | None = None

    def cancel(self) -> None:
        """Ends the request before the next step; any thread may call it."""
        self.cancelled = True


class Scheduler:
    """Serves one engine. Start it with `start`, end it with `drain`."""

    def __init__(self, vlm: SpeculativeVLM, limits: Limits | None = None) -> None:
        self.vlm, self.limits, self._engine = vlm, limits or Limits(), vlm.engine
        self.batch = _batch(self._engine)
        self._work: deque[Work] = deque()
        self.steps = 0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._draining = False
        self._seconds: deque[float] = deque(maxlen=RECENT)  # from the first step to the end of recent requests
        self.prefixes = Prefixes(vlm.target, self.limits.prefixes, self.limits.prefix_bytes)
        self._lock = request_lock(vlm.model)
        self._thread = threading.Thread(target=self._run, name="msd-scheduler", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being decoded."""
        return len(self.batch.members)

    @property
    def accepting(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._draining

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Adds requests to the queue, all or none. QueueFullError if there is no room, or the server is stopping."""
        with self._changed:
            if self._draining or len(self._waiting) + len(jobs) > self.limits.waiting:
                raise QueueFullError(self.retry_after())
            self._waiting.extend(jobs)
            self._changed.notify()

    def submit_work(self, work: Work) -> None:
        """Adds work that is not an answer. QueueFullError as from `submit`."""
        with self._changed:
            if self._draining or len(self._work) >= WAITING:
                raise QueueFullError(self.retry_after())
            self._work.append(work)
            self._changed.notify()

    def retry_after(self) -> int:
        """Seconds until the queue has moved on, estimated from recent requests; at least 1."""
        seconds = median(self._seconds) if self._seconds else 1.0
        return max(1, min(60, round(seconds * (1 + len(self._waiting)) / self.limits.rows)))

    def drain(self, seconds: float) -> None:
        """Takes no more requests, lets all present ones end within `seconds`, and stops the thread."""
        with self._changed:
            self._draining = True
            self._changed.notify()
        self._thread.join(seconds)
        for job in [*self._waiting, *self.batch.members]:
            job.cancel()
        for work in list(self._work):
            work.cancelled = True
        self._thread.join(IDLE_SECONDS + 30)

    def _run(self) -> None:
        """The thread: until drained, lets requests leave and join, then computes a step."""
        while True:
            with self._changed:
                while not self._waiting and not self.batch.members and not self._work:
                    if self._draining:
                        return
                    self._changed.wait(IDLE_SECONDS)
            try:
                with self._lock:
                    self._leave()
                    self._admit()
                    self._step()
                    self._advance()
            except Exception as error:  # of the model: the requests of this step fail, the server goes on serving
                log.exception("a step failed")
                self._fail_all(error)

    def _leave(self) -> None:
        """Ends cancelled and late requests, in the queue and in the batch."""
        oldest = time.monotonic() - self.limits.seconds
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled or job.arrival < oldest]
            for job in gone:
                self._waiting.remove(job)
        running = [job for job in self.batch.members if job.cancelled or job.arrival < oldest]
        for reason, jobs in (
            (CANCELLED, [job for job in running if job.cancelled]),
            (LATE, [job for job in running if not job.cancelled]),
        ):
            self.batch.end(jobs, reason)
        for job in [*gone, *running]:
            self._finish(job, Emission([], CANCELLED if job.cancelled else LATE))

    def _admit(self) -> None:
        """Prefills waiting requests, at most one if answers are being decoded."""
        decoding = bool(self.batch.members)
        while self._waiting and len(self.batch.members) < self.limits.rows and self._opens(self._waiting[0]):
            job = self._waiting[0]
            if job.inputs is None and not self._prepare(job):
                continue
            if not self._fits(job):
                return
            with self._changed:
                self._waiting.popleft()
            self._join(job)
            if decoding:
                return

    def _opens(self, job: Job) -> bool:
        """Whether a request can join the batch now; an empty batch becomes one of the request's engine."""
        engine = job.engine or self._engine
        if not self.batch.members and self.batch.engine is not engine:
            self.batch = _batch(engine)
        return self.batch.engine is engine and self.batch.open

    def _prepare(self, job: Job) -> bool:
        """Runs the processor; a request that fails in it or can never fit leaves the queue, and False is returned."""
        try:
            job.inputs = job.prepare()
            job.prompt_tokens = job.inputs["input_ids"].shape[1]
            most, needed = self.limits.cache_bytes, self._slots(job) * self.slot_bytes()
            if needed > most:
                raise UserError(
                    f"the request needs {needed / 1e6:.0f} MB for keys and values; at most {most / 1e6:.0f}"
                )
            return True
        except Exception as error:
            with self._changed:
                self._waiting.popleft()
            self._fail(job, error, "a request could not be prepared")
            return False

    def _slots(self, job: Job) -> int:
        """The cache slots that a prepared request takes."""
        return job.prompt_tokens + int(job.options["max_new_tokens"]) + self.vlm.plan.nodes + 1

    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot of one row, from the model's config."""
        text = self.vlm.target.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * width * self.vlm.model.dtype.itemsize

    def _fits(self, job: Job) -> bool:
        """Whether the batch's keys and values with this request stay within the memory."""
        return self.batch.bytes_with(self._slots(job)) <= self.limits.cache_bytes

    def _join(self, job: Job) -> None:
        """Prefills a request and adds it to the batch; an error of its own ends it alone."""
        seed = secrets.randbits(63) if job.seed is None else job.seed
        assert job.inputs is not None
        job.joined = time.monotonic()
        try:
            request = self._prefill(job, job.inputs, seed)
            request.sampler.drafts = job.drafts
            job.inputs = None
            emission = self.batch.join(job, request)
        except Exception as error:
            self._fail(job, error, "a prompt failed")
            return
        job.first_token = time.monotonic()
        self._deliver(job, emission)

    def _prefill(self, job: Job, inputs: dict[str, Any], seed: int) -> Prefilled:
        """Runs the prompt, behind the longest stored prefix that it begins with."""
        past = self.prefixes.past(inputs["input_ids"])
        request = self.vlm.prefill(inputs, [seed], past, **job.options)
        job.cached_tokens = job.prompt_tokens - request.state.prefilled
        self.prefixes.store(request)
        return request

    def _step(self) -> None:
        """Computes one step and hands out what it emitted."""
        if self.batch.members:
            emitted = self.batch.step()
            self.steps += 1
            for job, emission in emitted:
                self._deliver(job, emission)

    def _advance(self) -> None:
        """Computes one pass of the first piece of work."""
        if self._work and self._work[0].advance(time.monotonic() - self.limits.seconds):
            self._work.popleft()

    def _deliver(self, job: Job, emission: Emission) -> None:
        """Hands an emission to its request."""
        if emission.finish is None:
            _hand(job, emission)
            return
        if job.first_token is not None:
            self._seconds.append(time.monotonic() - job.first_token)
        self._finish(job, emission)

    def _finish(self, job: Job, outcome: Emission | Exception) -> None:
        """Hands out the last emission or the error of a request, and that it is over."""
        if not job.done:
            job.done, job.inputs = True, None
            _hand(job, outcome)
            if isinstance(outcome, Emission):
                _hand(job, None)

    def _fail(self, job: Job, error: Exception, what: str) -> None:
        """Ends a request with an error of its own; logs one that is not the client's, in the handler of `error`."""
        if not isinstance(error, UserError):
            log.exception(what)
        self._finish(job, error)

    def _fail_all(self, error: Exception) -> None:
        """Ends all requests of the batch with an error, and starts an empty one."""
        members, self.batch = self.batch.members, _batch(self._engine)
        for job in members:
            self._finish(job, error)


def _batch(engine: Engine) -> Batch[Job]:
    return Batch(engine, lambda job: job.trace)


def _hand(job: Job, outcome: Emission | Exception | None) -> None:
    """Calls `receive`; a receiver that fails ends its own request only."""
    try:
        job.receive(outcome)
    except Exception:  # such as the closed event loop of a client that has gone
        job.cancel()
