"""Chat completions: checks a request, runs its answers, and writes OpenAI's objects, whole or as events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from msd import drafters
from msd.core.statistics import Statistics
from msd.decode import Engine
from msd.drafters.auxiliary import encoder
from msd.drafters.base import Drafter
from msd.errors import UserError
from msd.events.clip import events_argument
from msd.inputs.media import FRAMES
from msd.serve.answers import PLAIN, Answer, Counts, Piece
from msd.serve.errors import HTTPError
from msd.serve.media import Decoder, Medium, Recorded
from msd.serve.metrics import Metrics
from msd.serve.scheduler import QueueFullError, Scheduler
from msd.serve.schema import Completion
from msd.serve.sources import SECONDS, Sources
from msd.verify import policy

INTERNAL = "the server could not compute this answer; try again, or ask its operator to read the log"
POLL_SECONDS = 0.25  # between two looks at whether a client is still there
FETCHERS = 16  # requests whose media are fetched at the same time
CHARACTERS, CONTEXT = 16, 1 << 17  # of text for each token of the context; the context of a model that states none
GRACE = 2.0  # seconds that a fetch may end late


class Completions:
    """The completions of one served model. name: what clients call it. most: default length of an answer.

    sources: where media may come from. frames: of the clip of a recording, where the request does not say.
    """

    def __init__(
        self, scheduler: Scheduler, metrics: Metrics, name: str, most: int, sources: Sources, frames: int = FRAMES
    ) -> None:
        self.scheduler, self.metrics, self.name, self.most, self.sources = scheduler, metrics, name, most, sources
        self._fetchers = ThreadPoolExecutor(FETCHERS, "msd-fetch")
        self.decoder = Decoder(rate=_sampling_rate(scheduler.vlm.processor), frames=frames)

    async def start(self, body: Completion) -> Running:
        """Checks a request and puts it into the queue. HTTPError if it is refused."""
        self.check(body)
        engine, media = self._engine(body), await self.media(body)
        processor = self.scheduler.vlm.processor
        events = self._events(body, media)
        answers = [Answer(processor, body, media, i, self.metrics, self.most, engine, events) for i in range(body.n)]
        with queue_full():
            self.scheduler.submit(*(answer.job for answer in answers))
        return Running(self, body, answers)

    async def media(self, body: Completion) -> list[Medium]:
        """Gets and decodes the media. HTTPError for the first that is refused."""
        parts, sources, loop = body.media, self.sources, asyncio.get_running_loop()
        fetchers = self._fetchers if sources.fetches(parts) else None  # slow hosts must not delay other requests
        try:
            self.decoder.check(kind for kind, _ in parts)
            self._check_recording(body)
            async with asyncio.timeout(SECONDS + GRACE):
                files = await loop.run_in_executor(fetchers, sources.files, parts)
            return await asyncio.to_thread(self.decoder.media, parts, files, body.recording)
        except UserError as error:
            raise HTTPError(400, str(error), "messages") from error
        except TimeoutError as error:
            raise HTTPError(400, "the media could not be fetched in time; send data:…;base64,…", "messages") from error

    def close(self) -> None:
        """Ends the helper process and the fetching threads."""
        self.decoder.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def check(self, body: Completion) -> None:
        """HTTPError for another model, text far beyond its context, or more answers than the queue has places."""
        if body.model != self.name:
            raise HTTPError(404, f"this server has the model '{self.name}'", "model", "model_not_found")
        length, most = sum(map(len, body.texts())), CHARACTERS * (self.scheduler.vlm.target.context_length or CONTEXT)
        if length > most:  # a tokenizer would take long to find that they do not fit
            raise HTTPError(400, f"the text has {length} characters; at most {most} for this model", "messages")
        if body.n > self.scheduler.limits.waiting:
            raise HTTPError(400, f"n is larger than the queue of {self.scheduler.limits.waiting}", "n")

    def _drafter(self, body: Completion) -> Drafter:
        """The drafter of a request."""
        return drafters.create(PLAIN) if body.msd.method == PLAIN else self.scheduler.vlm.drafter

    def _check_recording(self, body: Completion) -> None:
        """UserError for a recording that nothing would read, or whose frames the target does not take."""
        if body.recording is None:
            return
        drafter, processor = self._drafter(body), self.scheduler.vlm.processor
        if body.drawn and not any(getattr(processor, f"{kind}_token", None) for kind in ("image", "video")):
            raise UserError("this model takes no images, so it sees no frames of a recording; leave it out")
        if not body.drawn and encoder(drafter, "events") is None:
            raise UserError(f"method '{drafter.name}' reads no events; send the recording without other media")

    def _events(self, body: Completion, media: list[Medium]) -> dict[str, Any]:
        """The events for the drafter, as an argument of `generate()`."""
        events = next((medium.events for medium in media if isinstance(medium, Recorded)), None)
        return events_argument(self._drafter(body), events, body.drawn)

    def policy(self, body: Completion) -> tuple[str, float]:
        """(the policy of a request, its ε): the server's where the request does not say."""
        config = self.scheduler.vlm.config
        name, epsilon = body.msd.policy or config.verifier, body.msd.epsilon
        return name, (config.epsilon if name == config.verifier else 0.0) if epsilon is None else epsilon

    def _engine(self, body: Completion) -> Engine | None:
        """The engine of a request; None: the server's. HTTPError for a method or policy that this server cannot use.

        Every policy decodes greedily as `lossless` does, so only requests that sample need an engine of their own.
        """
        vlm, (name, epsilon) = self.scheduler.vlm, self.policy(body)
        if body.msd.method not in (None, PLAIN, vlm.drafter.name):
            raise HTTPError(
                400, f"this server drafts with '{vlm.drafter.name}', or with '{PLAIN}' not at all", "msd.method"
            )
        if (name, epsilon) == (vlm.config.verifier, vlm.config.epsilon):
            return None
        try:
            engine = vlm.engine_with(name, epsilon)
        except UserError as error:
            raise HTTPError(400, str(error), "msd") from error
        return None if vlm.verifier.lossless and body.temperature == 0 else engine


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
            if self._tells_usage:
                yield self._event([], **self._final())
            yield b"data: [DONE]\n\n"
        except HTTPError as failure:
            yield f"data: {json.dumps(failure.body())}\n\n".encode()
        finally:
            self.cancel()

    @property
    def _tells_usage(self) -> bool:
        """Whether the stream has usage: in its last event, and null in all others."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _choice(self, index: int, delta: dict[str, str], logprobs: list[Any], finish: str | None) -> dict[str, Any]:
        content = {"content": logprobs, "refusal": None} if logprobs else None
        return {"index": index, "delta": delta, "logprobs": content, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self._tells_usage else {}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices, **usage, **more}
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
        name, epsilon = self.owner.policy(self.body)
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
            "method": self.body.msd.method or self.owner.scheduler.vlm.drafter.name, "policy": name, "epsilon": epsilon,
            "tokens_by_modality": dict(sum((c.modality for c in counts), start=Counter())),
            "drafts_by_modality": by_modality,
            **({} if policy(name).lossless else {"divergence": _divergence(counts)}),
        }  # fmt: skip
        return {"usage": usage, "metrics": {"speculative_decoding": speculative}, "msd": own}


def _divergence(counts: Sequence[Counts]) -> dict[str, Any]:
    """The total variation of all tokens but the first of each answer, as in `Statistics`."""
    spent = {
        name: (sum(c.lossy[name] for c in counts), sum(c.divergence[name] for c in counts))
        for name in {name for c in counts for name in c.lossy}
    }
    exact = sum(max(0, c.tokens - 1) for c in counts)  # decoded greedily: nothing was spent
    none = {"tokens": exact, "per_token": 0.0, "total": 0.0, "by_modality": {}}
    return Statistics(divergence=spent).as_dict()["divergence"] or none


def _sampling_rate(processor: Any) -> int | None:
    """Samples per second of the sounds that a model takes; None if it takes none."""
    return processor.feature_extractor.sampling_rate if getattr(processor, "audio_token", None) else None


def failure(error: Exception) -> HTTPError:
    """What a client is told about an error of its answer: only a UserError's own text."""
    if isinstance(error, UserError):
        return HTTPError(400, str(error))
    if isinstance(error, TimeoutError):
        return HTTPError(504, "the answer did not begin in time; try again", code="deadline")
    return HTTPError(500, INTERNAL)
