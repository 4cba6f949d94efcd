"""Videos: some frames of a file, spread evenly over its time.

Two passes. The first reads packets without decoding them and learns when every frame is shown; the second decodes them
one after the other and keeps those wanted, so that memory holds the kept frames and what the decoder needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from msd.containers import decoded, opened
from msd.errors import UserError
from msd.images import MAX_PIXELS

FRAMES = 8  # as Video-LLaVA was trained (arXiv 2311.10122)
CLIP_FRAMES = 4  # as the target "reference-video" was taught
MOST_FRAMES = 512  # that may be asked for
MOST_PACKETS = 500_000  # of a file: more than two hours at 60 frames a second
MOST_PIXELS = 256 * 1000 * 1000  # of all kept frames together


@dataclass(frozen=True)
class Clip:
    """Decoded frames. indices: their numbers among the `total` frames of the video. fps: of the video, on average."""

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float


@dataclass(frozen=True)
class Video:
    """A video file as a prompt shows it: `frames` of its frames, as evenly in time as they come."""

    path: str | os.PathLike[str]
    frames: int = FRAMES

    def load(self) -> Clip:
        """The frames, upright and in order: the first, the last, and what is shown in between.

        A video with fewer frames than are wanted shows some twice. UserError: the file is missing, broken, no video,
        or larger than the limits of this module.
        """
        if not 1 <= self.frames <= MOST_FRAMES:
            raise UserError(f"{self.frames} frames of a video; ask for 1 to {MOST_FRAMES}")
        with opened(self.path, "video") as (container, stream, name):
            shown = _times(container, stream, name)
            size = stream.codec_context.width * stream.codec_context.height
            if size > MAX_PIXELS or size * self.frames > MOST_PIXELS:
                raise UserError(
                    f"{name} is {stream.codec_context.width}x{stream.codec_context.height} pixels, too large for "
                    f"{self.frames} frames; resize it or ask for fewer"
                )
            rate = float(stream.average_rate or 0)
            base = float(stream.time_base or 0)
        indices = evenly(shown, self.frames)
        with opened(self.path, "video") as (container, stream, name):
            kept = _kept(container, stream, set(indices), name)
        fps = (len(shown) - 1) / ((shown[-1] - shown[0]) * base) if len(shown) > 1 and base else rate or 1.0
        last = max(kept)  # a video whose end is broken goes on with its last good frame
        frames = tuple(kept[i] if i in kept else kept[last] for i in indices)
        return Clip(frames, tuple(indices), len(shown), fps)


def evenly(shown: list[int], count: int) -> list[int]:
    """Numbers of `count` frames: the ones on screen at evenly spaced times. shown: when each appears, ascending."""
    if count == 1:
        return [0]
    wanted = np.linspace(shown[0], shown[-1], count)
    found: list[int] = (np.searchsorted(shown, wanted + 1e-3, side="right") - 1).tolist()
    return found


def _times(container: Any, stream: Any, name: str) -> list[int]:
    """When each frame is shown, in units of the stream's time base; or just their numbers where it does not say."""
    times: list[int | None] = []
    for packet in container.demux(stream):
        if packet.size:
            times.append(packet.pts)
        if len(times) > MOST_PACKETS:
            raise UserError(f"{name} has more than {MOST_PACKETS} frames; cut out the part that matters")
    if not times:
        raise UserError(f"{name} has no frames; save or download it again")
    known = [t for t in times if t is not None]
    return sorted(known) if len(known) == len(times) else list(range(len(times)))


def _kept(container: Any, stream: Any, wanted: set[int], name: str) -> dict[int, Image.Image]:
    """Frames by number. All are decoded as far as the last one wanted, and one more kept in case it never comes."""
    stream.thread_type = "AUTO"
    kept: dict[int, Image.Image] = {}
    newest, number = None, -1
    for number, frame in enumerate(decoded(container, stream)):
        if frame.width * frame.height > MAX_PIXELS:
            raise UserError(f"{name} holds a frame of {frame.width}x{frame.height} pixels; resize it")
        newest = frame
        if number in wanted:
            kept[number] = _upright(frame)
        if number == max(wanted):
            break
    if newest is None:
        raise UserError(f"{name} is broken: not one of its frames can be decoded; save or download it again")
    if number not in kept:
        kept[number] = _upright(newest)
    size = kept[min(kept)].size
    return {n: image if image.size == size else image.resize(size) for n, image in kept.items()}


def _upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned as the file says."""
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
