"""Chat completions: checks a request, runs its answers, and writes OpenAI's objects, whole or as events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msd.errors import UserError
from msd.serve.answers import Answer, Piece
from msd.serve.errors import HTTPError
from msd.serve.media import Decoder, Medium
from msd.serve.metrics import Metrics
from msd.serve.scheduler import PLAIN, QueueFullError, Scheduler
from msd.serve.schema import Completion

INTERNAL = "the server could not compute this answer; try again, or ask its operator to read the log"
POLL_SECONDS = 0.25  # between two looks at whether a client is still there


class Completions:
    """The completions of one served model. name: what clients call it. most: default length of an answer."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, name: str, most: int) -> None:
        self.scheduler, self.metrics, self.name, self.most = scheduler, metrics, name, most
        self.decoder = Decoder()

    async def start(self, body: Completion) -> Running:
        """Checks a request and puts it into the queue. HTTPError if it is refused."""
        media = await self.check(body)
        processor = self.scheduler.vlm.processor
        answers = [Answer(processor, body, media, i, self.metrics, self.most) for i in range(body.n)]
        with queue_full():
            self.scheduler.submit(*(answer.job for answer in answers))
        return Running(self, body, answers)

    async def check(self, body: Completion) -> list[Medium]:
        """Returns the media of a request. HTTPError for unreadable ones, another model, or other drafting."""
        if body.model != self.name:
            raise HTTPError(404, f"this server has the model '{self.name}'", "model", "model_not_found")
        if body.n > self.scheduler.limits.waiting:
            raise HTTPError(400, f"n is larger than the queue of {self.scheduler.limits.waiting}", "n")
        config, method = self.scheduler.vlm.config, self.scheduler.vlm.drafter.name
        for field, mine in (("method", method), ("policy", config.verifier), ("epsilon", config.epsilon)):
            wanted = getattr(body.msd, field)
            if wanted is not None and wanted not in (mine, *([PLAIN] if field == "method" else [])):
                raise HTTPError(400, f"this server decodes with {field} '{mine}'; leave it out", f"msd.{field}")
        try:
            return await asyncio.to_thread(self.decoder.media, body.media)
        except UserError as error:
            raise HTTPError(400, str(error), "messages") from error


@contextmanager
def queue_full() -> Iterator[None]:
    """Turns a full queue into an HTTPError that says when to come back."""
    try:
        yield
    except QueueFullError as error:
        headers = {"Retry-After": str(error.retry_after)}
        raise HTTPError(429, str(error), code="queue_full", headers=headers) from error


class Running:
    """A completion whose answers are being computed."""

    def __init__(self, owner: Completions, body: Completion, answers: Sequence[Answer]) -> None:
        self.owner, self.body, self.answers = owner, body, answers
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": owner.name}

    def cancel(self) -> None:
        """Ends all answers before the next step."""
        for answer in self.answers:
            answer.job.cancel()

    async def whole(self, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any] | None:
        """The object `chat.completion`; None, and the answers end, if the client has `gone`."""
        texts, logprobs, reasons = ([[] for _ in self.answers] for _ in range(3))  # type: ignore[var-annotated]
        task = asyncio.ensure_future(self._collect(texts, logprobs, reasons))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=POLL_SECONDS)
                if not task.done() and await gone():
                    return None
            await task
        finally:
            task.cancel()
            self.cancel()
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
                "logprobs": {"content": logprobs[i], "refusal": None} if self.body.logprobs else None,
                "finish_reason": reasons[i][0],
            }
            for i in range(len(self.answers))
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, **self._final()}

    async def _collect(self, texts: list[Any], logprobs: list[Any], reasons: list[Any]) -> None:
        """Reads all pieces of all answers."""
        async for number, piece in self._pieces():
            texts[number].append(piece.text)
            logprobs[number] += piece.logprobs
            reasons[number] += [piece.finish] if piece.finish else []

    async def events(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream. A failure after the first piece is an event with an error object."""
        try:
            for i in range(len(self.answers)):
                yield self._event([self._choice(i, {"role": "assistant", "content": ""}, [], None)])
            async for number, piece in self._pieces():
                delta = {"content": piece.text} if piece.text or piece.logprobs else {}
                traced = {"msd": {"step": piece.step}} if piece.step is not None else {}
                yield self._event([self._choice(number, delta, piece.logprobs, piece.finish)], **traced)
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield self._event([], **self._final())
            yield b"data: [DONE]\n\n"
        except HTTPError as failure:
            yield f"data: {json.dumps(failure.body())}\n\n".encode()
        finally:
            self.cancel()

    def _choice(self, index: int, delta: dict[str, str], logprobs: list[Any], finish: str | None) -> dict[str, Any]:
        content = {"content": logprobs, "refusal": None} if logprobs else None
        return {"index": index, "delta": delta, "logprobs": content, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come. HTTPError if one fails; the others end too."""
        reads = {asyncio.ensure_future(answer.pieces.get()): answer for answer in self.answers}
        try:
            while reads:
                done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
                for read in done:
                    answer, piece = reads.pop(read), read.result()
                    if isinstance(piece, Exception):
                        raise failure(piece) from piece
                    yield answer.number, piece
                    if piece.finish is None:
                        reads[asyncio.ensure_future(answer.pieces.get())] = answer
        finally:
            for read in reads:
                read.cancel()

    def _final(self) -> dict[str, Any]:
        """The usage, and what the drafts did, in vLLM's field and in our own."""
        counts, jobs = [answer.counts for answer in self.answers], [answer.job for answer in self.answers]
        prompt, new = jobs[0].prompt_tokens, sum(c.tokens for c in counts)
        drafts, kinds = sum(c.drafts for c in counts), {name for c in counts for name in c.drafted}
        by_modality = {
            name: {"drafted": sum(c.drafted[name] for c in counts), "accepted": sum(c.accepted[name] for c in counts)}
            for name in sorted(kinds)
        }
        drafted, accepted = (sum(n[of] for n in by_modality.values()) for of in ("drafted", "accepted"))
        steps = sum(c.steps for c in counts) - len(counts)  # without prefill
        config, vlm = self.owner.scheduler.vlm.config, self.owner.scheduler.vlm
        usage = {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": jobs[0].cached_tokens},
        }  # fmt: skip
        speculative = {
            "num_drafts": drafts, "num_draft_tokens": drafted, "num_accepted_tokens": accepted,
            "acceptance_rate": accepted / drafted if drafted else 0.0,
            "mean_acceptance_length": (new - len(counts)) / steps if steps > 0 else 0.0,
        }  # fmt: skip
        own = {
            "method": self.body.msd.method or vlm.drafter.name, "policy": config.verifier, "epsilon": config.epsilon,
            "tokens_by_modality": dict(sum((c.modality for c in counts), start=Counter())),
            "drafts_by_modality": by_modality,
        }  # fmt: skip
        return {"usage": usage, "metrics": {"speculative_decoding": speculative}, "msd": own}


def failure(error: Exception) -> HTTPError:
    """What a client is told about an error of its answer: only a UserError's own text."""
    if isinstance(error, UserError):
        return HTTPError(400, str(error))
    if isinstance(error, TimeoutError):
        return HTTPError(504, "the answer did not begin in time; try again", code="deadline")
    return HTTPError(500, INTERNAL)
