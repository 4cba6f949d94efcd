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
from msd.events import EventStream, Recording
from msd.events.pieces import Events

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
