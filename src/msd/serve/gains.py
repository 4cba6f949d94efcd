"""The information gain of an image or a clip: how much each token of an answer depends on it (`msd.labels.gain`).

The passes run in the scheduler's thread, one between two steps of the running answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Annotated, Any

import torch
from pydantic import Field

from msd.errors import UserError
from msd.inputs.media import Clip
from msd.labels.gain import answer_logits, image_blocks, image_columns, image_frames, masking_cost
from msd.serve.answers import prompt_of
from msd.serve.completions import POLL_SECONDS, Completions, failure, queue_full
from msd.serve.media import Medium
from msd.serve.schema import About, Completion
from msd.serve.work import Work
from msd.targets.base import Target

TOKENS = 1024  # of an answer
LOGITS = 60_000_000  # of an answer: tokens · vocabulary, 0.5 GB in float64
SIDE = 4  # blocks of an image in each direction


class Measured(About):
    """The body of `POST /v1/msd/gain`. tokens: ids of the answer to `messages`, as `msd.trace` gives them."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=TOKENS)]


async def measure(
    completions: Completions, body: Measured, gone: Callable[[], Awaitable[bool]]
) -> dict[str, Any] | None:
    """Returns the gain of each token in nats, by blocks or frames; None if the client has `gone`. HTTPError if refused.

    `blocks` is None unless there is one image whose tokens form a square grid; `frames` is None unless there is one
    video or recording, whose frames the target sees as images.
    """
    asked = body.asked()
    completions.check(asked)
    media = await completions.media(asked)
    target = completions.scheduler.vlm.target
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def take(outcome: Any) -> None:
        if not result.done():
            result.set_result(outcome)

    def receive(outcome: Any) -> None:
        loop.call_soon_threadsafe(take, outcome)

    work = Work(_passes(target, completions.scheduler.vlm.processor, asked, media, body.tokens), receive)
    with queue_full():
        completions.scheduler.submit_work(work)
    try:
        while not result.done():
            await asyncio.wait({result}, timeout=POLL_SECONDS)
            if not result.done() and await gone():
                return None
    finally:
        work.cancelled = True
    outcome = result.result()
    if isinstance(outcome, Exception):
        raise failure(outcome) from outcome
    return {"object": "msd.gain", "model": body.model, **outcome}


def _passes(
    target: Target, processor: Any, asked: Completion, media: list[Medium], tokens: list[int]
) -> Generator[None, None, dict[str, Any]]:
    """Yields after each pass of the target; returns the gains."""
    inputs = prompt_of(processor, asked, media).inputs()
    length, context = inputs["input_ids"].shape[1] + len(tokens), target.context_length
    vocabulary = target.text_config.vocab_size
    if max(tokens) >= vocabulary:
        raise UserError(f"tokens: {max(tokens)} is not an id of this model's {vocabulary} tokens")
    if len(tokens) * vocabulary > LOGITS:
        raise UserError(f"tokens: {len(tokens)} are more than the {LOGITS // vocabulary} that can be measured at once")
    if context is not None and length > context:
        raise UserError(f"the prompt and {len(tokens)} tokens do not fit the model's context of {context}")
    with torch.inference_mode():
        inputs = target.encode_images(dict(inputs))
    columns = image_columns(target, inputs["input_ids"])
    if not columns.any():
        raise UserError("messages: there is no image whose gain could be measured")
    logits = answer_logits(target, inputs, [tokens])
    yield
    gain = masking_cost(target, inputs, [tokens], columns, logits)[0]
    frames = image_frames(target, inputs["input_ids"], _frames(processor, media))
    parts = []
    for masked in frames or image_blocks(target, inputs["input_ids"], SIDE):
        yield
        parts.append(masking_cost(target, inputs, [tokens], masked, logits)[0])
    by_token = [[round(nats, 4) for nats in token] for token in torch.stack(parts, 1).tolist()] if parts else None
    return {
        "gain": [round(nats, 4) for nats in gain.tolist()],
        "side": SIDE if by_token and not frames else None,
        "blocks": None if frames else by_token,
        "frames": by_token if frames else None,
    }


def _frames(processor: Any, media: list[Medium]) -> int:
    """The frames of the only video or recording, if the target sees them as images; else 0."""
    as_images = not getattr(processor, "video_token", None)
    return len(media[0].frames) if as_images and len(media) == 1 and isinstance(media[0], Clip) else 0
