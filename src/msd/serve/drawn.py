"""The frames that the target sees of an event camera's recording, as images for a page."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from msd.events.frames import encoded, event_frames
from msd.serve.completions import Completions
from msd.serve.errors import HTTPError
from msd.serve.media import Recorded
from msd.serve.schema import About


async def drawn(completions: Completions, body: About) -> dict[str, Any]:
    """Returns each frame with its number of events and the times of its first and last one, µs. HTTPError if refused.

    Frames of a recording beside other media are for the drafter only; they are drawn in the same way.
    """
    asked = body.asked()
    completions.check(asked)
    if asked.recording is None:
        raise HTTPError(400, "messages: there is no recording whose frames could be drawn", "messages")
    media = await completions.media(asked)
    recorded = next(medium for medium in media if isinstance(medium, Recorded))
    return {"object": "msd.frames", "model": body.model, **await asyncio.to_thread(_frames, recorded)}


def _frames(recorded: Recorded) -> dict[str, Any]:
    """The size of the sensor, the number of events, and the frames as data URIs."""
    drawn = event_frames(recorded.events, len(recorded.frames))
    frames = []
    for image, count, (begin, end) in zip(recorded.frames, drawn.counts.tolist(), drawn.spans.tolist(), strict=True):
        data = base64.b64encode(encoded(image.quantize(8), "PNG", optimize=True)).decode()
        frames.append({"image": f"data:image/png;base64,{data}", "events": count, "begin": begin, "end": end})
    return {"size": list(recorded.events.size), "events": len(recorded.events), "frames": frames}
