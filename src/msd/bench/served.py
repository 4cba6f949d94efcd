"""Measures the speed of an OpenAI-compatible server: its time to the first token, and its acceptance if it tells it.

One request is under way at a time. Every answer is kept as it arrives (`msd.bench.unfinished`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from msd.bench.conversation import LONGEST, digest
from msd.bench.data import Sample
from msd.bench.unfinished import Unfinished
from msd.errors import UserError
from msd.inputs.media import Video
from msd.system.server import RefusedRequestError, Server, data_uri

NAMES = "drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos"
COUNTER = re.compile(rf"vllm:spec_decode_num_({NAMES})(?:_total)?[{{ ]")
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class ServedAnswer:
    """One answer. first: seconds to the first text. counts: what vLLM's counters grew by; empty if there are none."""

    text: str
    tokens: int
    ids: list[int]
    seconds: float
    first: float
    counts: dict[str, float] = field(default_factory=dict)


def counters(metrics: str) -> dict[str, float]:
    """Reads vLLM's counters of speculation from the text of `/metrics`, summed over engines; {} without any.

    The counters by position are `accepted_tokens_per_pos 0`, ….
    """
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        match = COUNTER.match(line)
        if match is None:
            continue
        position = POSITION.search(line)
        name = match[1] + (f" {position[1]}" if position else "")
        found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


def speculation(counts: dict[str, float]) -> dict[str, Any] | None:
    """Returns the figures under vLLM's names; None if nothing was drafted."""
    steps, drafted = counts.get("drafts", 0), counts.get("draft_tokens", 0)
    if not steps or not drafted:
        return None
    reached = [steps]  # steps that accepted so many tokens or more
    while (name := f"accepted_tokens_per_pos {len(reached) - 1}") in counts:
        reached.append(counts[name])
    following = [*reached[1:], 0]
    histogram = {str(n): int(a - b) for n, (a, b) in enumerate(zip(reached, following, strict=True))}
    return {
        "mean_acceptance_length": 1 + counts["accepted_tokens"] / steps,
        "draft_acceptance_rate": counts["accepted_tokens"] / drafted,
        "acceptance_histogram": histogram if len(reached) > 1 else None,
        "num_spec_steps": int(steps), "num_draft_tokens": int(drafted),
        "num_accepted_draft_tokens": int(counts["accepted_tokens"]), "num_spec_tokens": len(reached) - 1 or None,
    }  # fmt: skip


class ServedBench:
    """Lets a server answer the samples, greedily or with a temperature; earlier turns always greedily."""

    def __init__(
        self, server: Server, model: str, samples: Sequence[Sample], limit: int, temperature: float, out: Path | None
    ) -> None:
        """limit: tokens of an answer. out: folder of the kept answers."""
        self.server, self.model, self.samples = server, model, samples
        self.limit, self.temperature = limit, temperature
        self.kept, self.answers = Unfinished(out), list[ServedAnswer]()
        self._earlier: dict[tuple[Any, ...], str] = {}
        self._optional: dict[str, Any] = {"return_token_ids": True}
        for sample in samples:
            if any(isinstance(image, Video) for image in sample.images):
                raise UserError(f"{sample.where}: videos are not sent to a server; leave the line out")
        if out is not None:
            self.kept.resume({
                "server_model": model, "data": digest(samples), "max_new_tokens": limit, "temperature": temperature
            })  # fmt: skip

    def measure(self, report: Callable[[str], None]) -> None:
        """Asks for all answers that are not kept. UserError if the server ends; what is kept remains."""
        for number, sample in enumerate(self.samples):
            report(f"{number + 1} of {len(self.samples)}")
            kept = self.kept.get("served", ServedAnswer, number)
            self.answers.append(kept or self.kept.put("served", number, self._measured(sample)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row of figures for all samples, and one for each task."""
        tasks = list(dict.fromkeys(sample.task for sample in self.samples))
        return [self._row(task) for task in ("all", *(tasks if len(tasks) > 1 else ()))]

    def outputs(self) -> list[dict[str, Any]]:
        """Returns data lines for `msd verify --outputs`, of the samples without earlier turns."""
        pairs = [pair for pair in zip(self.samples, self.answers, strict=True) if not pair[0].before]
        return [
            {"image": [str(Path(str(i)).resolve()) for i in s.images], "prompt": s.prompt, "task": s.task}
            | ({"tokens": a.ids} if a.ids else {"text": a.text.strip()})
            for s, a in pairs
        ]

    def _row(self, task: str) -> dict[str, Any]:
        own = [a for s, a in zip(self.samples, self.answers, strict=True) if task in ("all", s.task)]
        tokens, seconds = sum(a.tokens for a in own), sum(a.seconds for a in own)
        total: dict[str, float] = {}
        for answer in own:
            for name, count in answer.counts.items():
                total[name] = total.get(name, 0.0) + count
        drafted = speculation(total)
        return {
            "method": f"server:{self.model}", "task": task, "samples": len(own), "tokens": tokens,
            "mean_answer_tokens": tokens / len(own), "tokens_per_second": tokens / seconds, "seconds": seconds,
            "first_token_s": median(a.first for a in own),
            "mean_acceptance_length": drafted["mean_acceptance_length"] if drafted else None,
            "draft_acceptance_rate": drafted["draft_acceptance_rate"] if drafted else None,
            "speculative_decoding": drafted,
        }  # fmt: skip

    def _measured(self, sample: Sample) -> ServedAnswer:
        messages = self._messages(sample)
        before = counters(self.server.metrics())
        answer = self._ask(messages, self.limit, self.temperature)
        after = counters(self.server.metrics())
        counts = {name: value - before.get(name, 0.0) for name, value in after.items()}
        return ServedAnswer(answer.text, answer.tokens, answer.ids, answer.seconds, answer.first, counts)

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the chat: images before the first question, and the server's own answers to earlier turns."""
        chat: list[dict[str, Any]] = []
        for turn, question in enumerate((*sample.before, sample.prompt)):
            pictures = [] if turn else [data_uri(Path(str(image))) for image in sample.images]
            parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
            chat.append(
                {"role": "user", "content": [*parts, {"type": "text", "text": question}] if parts else question}
            )
            if turn < len(sample.before):
                key = (sample.images, sample.before[: turn + 1])
                if key not in self._earlier:
                    self._earlier[key] = self._ask(chat, LONGEST, 0.0).text.strip()
                chat.append({"role": "assistant", "content": self._earlier[key]})
        return chat

    def _ask(self, messages: list[dict[str, Any]], limit: int, temperature: float) -> ServedAnswer:
        body = {
            "model": self.model, "messages": messages, "temperature": temperature, "max_tokens": limit,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            events, seconds = self.server.stream("chat/completions", body | self._optional)
        except RefusedRequestError:
            if not self._optional:
                raise
            events, seconds = self.server.stream("chat/completions", body)
            self._optional = {}
        return _answer(events, seconds)


def _answer(events: list[tuple[float, dict[str, Any]]], seconds: float) -> ServedAnswer:
    """Reads a streamed chat completion. UserError for anything else, and without a number of tokens."""
    text, ids, first, told = "", list[int](), None, None
    for at, event in events:
        if "error" in event:
            raise UserError(f"the server's answer is an error: {str(event['error'])[:200]}")
        told = (event.get("usage") or {}).get("completion_tokens", told)
        for choice in event.get("choices") or ():
            piece = (choice.get("delta") or {}).get("content") or ""
            first = at if first is None and piece else first
            text += piece
            ids += choice.get("token_ids") or []
    tokens = told or len(ids)
    if not tokens:
        raise UserError("the server's answer does not tell how many tokens it has")
    return ServedAnswer(text, tokens, ids, seconds, seconds if first is None else first)
