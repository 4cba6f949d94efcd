"""Videos: some frames of a file, spread evenly over its time.

Which frames are wanted is known once all have been decoded: a decoder leaves out packets that an edit list hides, or
that need what was cut off. So packets, read without decoding, only give a guess. One pass decodes all frames, keeps
those of the guess and learns when each is shown; where the guess was wrong, a second pass keeps the right ones. Memory
holds the kept frames and what the decoder needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from msd.errors import UserError
from msd.inputs.containers import decoded, opened
from msd.inputs.images import MAX_PIXELS

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
            guess = _packet_times(container, stream, name)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS or width * height * self.frames > MOST_PIXELS:
                raise UserError(
                    f"{name} is {width}x{height} pixels, too large for {self.frames} frames; resize it or ask for fewer"
                )
            rate = float(stream.average_rate or 0)
            base = float(stream.time_base or 0)
        kept, times = self._decode(set(evenly(_ascending(guess), self.frames)))
        shown = _ascending(times)
        indices = evenly(shown, self.frames)
        if not set(indices) <= kept.keys():
            kept, _ = self._decode(set(indices))
        fps = (len(shown) - 1) / ((shown[-1] - shown[0]) * base) if shown == times and base and len(times) > 1 else rate
        return Clip(tuple(kept[i] for i in indices), tuple(indices), len(shown), fps or 1.0)

    def _decode(self, wanted: set[int]) -> tuple[dict[int, Image.Image], list[int | None]]:
        """(the frames whose numbers are wanted, when each frame of the video is shown, in the stream's time base)."""
        kept: dict[int, Image.Image] = {}
        times: list[int | None] = []
        with opened(self.path, "video") as (container, stream, name):
            stream.thread_type = "AUTO"
            for frame in decoded(container, stream):
                if frame.width * frame.height > MAX_PIXELS:
                    raise UserError(f"{name} holds a frame of {frame.width}x{frame.height} pixels; resize it")
                if len(times) in wanted:
                    kept[len(times)] = _upright(frame)
                times.append(frame.pts)
            if not times:
                raise UserError(f"{name} is broken: not one of its frames can be decoded; save or download it again")
        size = next((image.size for image in kept.values()), (0, 0))
        return {n: image if image.size == size else image.resize(size) for n, image in kept.items()}, times


def evenly(shown: list[int], count: int) -> list[int]:
    """Numbers of `count` frames: the ones on screen at evenly spaced times. shown: when each appears, ascending."""
    if count == 1:
        return [0]
    wanted = np.linspace(shown[0], shown[-1], count)
    found: list[int] = (np.searchsorted(shown, wanted + 1e-3, side="right") - 1).tolist()
    return found


def _packet_times(container: Any, stream: Any, name: str) -> list[int | None]:
    """When the frame of each packet is shown, in that order where it is known; without packets marked as hidden."""
    times: list[int | None] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
        if len(times) > MOST_PACKETS:
            raise UserError(f"{name} has more than {MOST_PACKETS} frames; cut out the part that matters")
    if not times:
        raise UserError(f"{name} has no frames; save or download it again")
    return times if None in times else sorted(times)  # type: ignore[type-var]


def _ascending(times: list[int | None]) -> list[int]:
    """The times of frames; just their numbers where some have none, times go back, or all have the same."""
    known = [time for time in times if time is not None]
    if len(known) == len(times) and known[-1] > known[0] and all(a <= b for a, b in pairwise(known)):
        return known
    return list(range(len(times)))


def _upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned as the file says."""
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
