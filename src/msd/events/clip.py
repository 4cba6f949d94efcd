"""What a request makes of a recording: frames of it for a target that sees nothing else, and events for a drafter."""

from __future__ import annotations

from typing import Any

from msd.drafters import auxiliary
from msd.drafters.base import Drafter
from msd.errors import UserError
from msd.events.frames import event_frames
from msd.events.recording import Events, Recording
from msd.inputs.media import Clip


def event_clip(events: Events, frames: int) -> Clip:
    """Draws a stream or recording as a clip of `frames` frames with equally many events. UserError without events."""
    drawn = event_frames(events, frames)
    if not drawn.counts.any():
        name = f"'{events.path}'" if isinstance(events, Recording) else "the recording"
        raise UserError(f"{name} holds no events; give a recording with events")
    seconds = (drawn.spans.max() - drawn.spans[drawn.counts > 0].min()) / 1e6
    return Clip(tuple(drawn.images()), tuple(range(frames)), frames, frames / seconds if seconds else 1.0)


def events_argument(drafter: Drafter, events: Events | None, drawn: bool) -> dict[str, Any]:
    """Returns the argument `events` of `SpeculativeVLM.generate`.

    drawn: whether the target sees frames of the recording; then a drafter that reads no events gets none. Otherwise it
    gets them, and refuses them.
    """
    unused = events is None or (drawn and auxiliary.encoder(drafter, "events") is None)
    return {} if unused else {"events": events}
