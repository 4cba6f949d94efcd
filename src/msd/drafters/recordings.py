"""Event recordings on their way to a drafter that sees them.

Such a drafter has a method `beside(recording) -> [E, H]`: the tokens that it makes of one recording (an `EventStream`
or a `Recording`), always as many, never all zero. A drafter that was built without sight of events has none, or None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from msd import events
from msd.drafters.base import Drafter
from msd.errors import UserError
from msd.events import EventStream, Recording, frames
from msd.events.pooling import pooled
from msd.events.recording import Events
from msd.inputs import prompts
from msd.targets.base import Target
from msd.targets.vision import VisionCache

Source: TypeAlias = Events | str | os.PathLike[str]
Encoder = Callable[[Events], Tensor]


def encoder(drafter: Drafter) -> Encoder | None:
    """What makes tokens of a recording; None where the drafter sees no events."""
    found: Encoder | None = getattr(drafter, "beside", None)
    return found


def argument(drafter: Drafter, sources: Sequence[Source | None]) -> dict[str, Any]:
    """The argument `events` of `SpeculativeVLM.generate` for a batch; none where the drafter sees no events."""
    seen = encoder(drafter) is not None and any(source is not None for source in sources)
    return {"events": list(sources)} if seen else {}


def work(drafter: Drafter, sources: Source | Sequence[Source | None], rows: int) -> Callable[[], Tensor] | None:
    """A function that makes the tokens [B, E, H] of a batch of `rows`, zero in rows without a recording.

    sources: one for each row, or one alone. Files are opened now. None where no row has a recording. UserError: the
    drafter sees no events, there is one recording too many or too few, or a file is none.
    """
    one = isinstance(sources, EventStream | Recording | str | os.PathLike)
    listed: list[Source | None] = [sources] if one else list(sources)  # type: ignore[list-item, arg-type]
    if len(listed) != rows:
        raise UserError(f"{rows} prompts but {len(listed)} event recordings; give one for each, or None")
    if all(source is None for source in listed):
        return None
    encode = encoder(drafter)
    if encode is None:
        raise UserError(
            f"method '{drafter.name}' sees no events; 'eventgpt' does, and 'msd' where it was trained beside them "
            "(docs/events.md)"
        )
    opened = [events.open_chunks(s) if isinstance(s, str | os.PathLike) else s for s in listed]
    return partial(_tokens, encode, opened)


def _tokens(encode: Encoder, recordings: Sequence[Events | None]) -> Tensor:
    made = [None if recording is None else encode(recording) for recording in recordings]
    empty = torch.zeros_like(next(tokens for tokens in made if tokens is not None))
    return torch.stack([empty if tokens is None else tokens for tokens in made])


FRAMES = 5


@torch.no_grad()
def event_tokens(target: Target, processor: Any, recording: Events, count: int = FRAMES) -> Tensor:
    """[F + P, H] tokens of `count` frames: temporal ones, then spatial ones.

    Safe beside a prefill of the target in another thread: it leaves the target's vision cache alone. UserError for a
    target that takes no images, or cuts them into tiles.
    """
    if not any(kind.modality == "image" for kind in target.pictures):
        raise UserError("the target takes no images, so it cannot look at event frames")
    inputs = prompts.prepare(processor, [frames(recording, count, "count")], ["."])
    encoded = VisionCache(limit=count).encode(target.model, inputs, target.pictures)
    states = encoded["mm_encoder_outputs"]["image"].pooler_output
    states = states if isinstance(states, Tensor) else torch.cat(list(states))
    if states.shape[:-1].numel() % count:
        raise UserError(
            f"the target sees {states.shape[:-1].numel()} tokens in {count} event frames, unequally many each"
        )
    return pooled(states.reshape(count, -1, states.shape[-1]))
