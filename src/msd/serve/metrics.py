"""Metrics in Prometheus' format, under vLLM's names where vLLM has them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from msd.serve.batch import Emission
from msd.serve.scheduler import Job, Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0)


class VisionCache(Collector):
    """The counts of the cache of vision features."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self.scheduler, self.model = scheduler, model

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See `Collector`."""
        vision = self.scheduler.vlm.target.vision
        for name, text, count in (
            ("mm_cache_hits", "Images whose features were cached.", vision.hits),
            ("mm_cache_queries", "Images of all prompts.", vision.hits + vision.misses),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=("model_name",))
            family.add_metric((self.model,), count)
            yield family


class Metrics:
    """The counts of one server."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self.registry, self._model, self._scheduler = CollectorRegistry(), model, scheduler
        self._gauge("num_requests_running", "Requests being decoded.", lambda: scheduler.running)
        self._gauge("num_requests_waiting", "Requests in the queue.", lambda: scheduler.waiting)
        self.registry.register(VisionCache(scheduler, model))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of all prompts.")
        self.cached_tokens = self._counter("prefix_cache_hits", "Prompt tokens taken from earlier prompts.")
        self.sought_tokens = self._counter("prefix_cache_queries", "Prompt tokens looked for in earlier prompts.")
        self.tokens = self._counter("generation_tokens", "Tokens of all answers.")
        self.drafts = self._counter("spec_decode_num_drafts", "Steps of rows that drafted.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self.by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted drafted tokens by their place in a step.",
            ("model_name", "position"), registry=self.registry,
        )  # fmt: skip
        self.by_modality, self.drafted_by_modality, self.accepted_by_modality = (
            Counter(f"msd:{name}_by_modality", text, ("model_name", "modality"), registry=self.registry)
            for name, text in (
                ("emitted_tokens", "Tokens by predicted modality."),
                ("spec_decode_num_draft_tokens", "Drafted tokens by the modality that drafted them."),
                ("spec_decode_num_accepted_tokens", "Accepted drafted tokens by the modality that drafted them."),
            )
        )
        self.ended = Counter(
            "vllm:request_success", "Answers by the reason of their end.", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self.queued = self._histogram("request_queue_time_seconds", "Seconds in the queue.")
        self.first_token = self._histogram("time_to_first_token_seconds", "Seconds to the first token.")
        self.per_token = self._histogram("time_per_output_token_seconds", "Seconds per token after the first.")
        self.total = self._histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.")

    def read(self, job: Job, emission: Emission) -> None:
        """Counts what a step emitted."""
        self.tokens.inc(len(emission.tokens))
        if emission.drafted:
            self.drafts.inc()
            self.draft_tokens.inc(emission.drafted.total())
            self.accepted.inc(emission.accepted.total())
            for position in range(emission.accepted.total()):
                self.by_position.labels(self._model, position).inc()
            for counter, kinds in (
                (self.drafted_by_modality, emission.drafted), (self.accepted_by_modality, emission.accepted),
            ):  # fmt: skip
                for name, n in kinds.items():
                    counter.labels(self._model, name).inc(n)
        for name in emission.modality:
            self.by_modality.labels(self._model, name).inc()

    def finish(self, job: Job, tokens: int, reason: str, now: float) -> None:
        """Counts a request that has ended. now: `time.monotonic`."""
        self.ended.labels(self._model, reason).inc()
        self.prompt_tokens.inc(job.prompt_tokens)
        self.cached_tokens.inc(job.cached_tokens)
        if self._scheduler.limits.prefixes:
            self.sought_tokens.inc(job.prompt_tokens)
        self.queued.observe((job.joined or now) - job.arrival)
        self.total.observe(now - job.arrival)
        if job.first_token is not None:
            self.first_token.observe(job.first_token - job.arrival)
            if tokens > 1:
                self.per_token.observe((now - job.first_token) / (tokens - 1))

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, value: object) -> None:
        gauge = Gauge(f"vllm:{name}", text, ("model_name",), registry=self.registry)
        gauge.labels(self._model).set_function(value)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, ("model_name",), registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        made = Histogram(f"vllm:{name}", text, ("model_name",), buckets=SECONDS, registry=self.registry)
        return made.labels(self._model)
