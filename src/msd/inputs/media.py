"""Opening films and sounds with PyAV, trusting nothing of what a file says.

Only the formats named here are tried, so that a playlist (HLS, DASH, concat) cannot make the library open other files
or addresses. A packet that cannot be decoded is left out; whatever else a broken file raises becomes one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.errors import UserError
from msd.inputs.images import MAX_PIXELS
from msd.system.files import open_media, shortened

FORMATS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "gif", "apng", "ogg", "asf", "m4v", "ivf",
    "wav", "w64", "mp3", "flac", "aac", "aiff", "au", "caf", "amr",
)  # fmt: skip
KNOWN = {"video": "MP4, MOV, MKV, WebM or AVI", "audio": "WAV, MP3, FLAC, OGG or M4A"}


@contextmanager
def opened(source: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, Any, str]]:
    """(container, its first stream of `kind`, the file's name for messages); kind: "video" or "audio".

    UserError: PyAV is not installed, the path is no regular file, or no such stream is found in it.
    """
    name = f"'{shortened(os.fsdecode(source))}'"
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"reading {name} needs PyAV, which is not installed; pip install 'msd-decoding[video]'"
        ) from error
    with open_media(source, name, kind) as file:
        try:
            container = av.open(file, options={"format_whitelist": ",".join(FORMATS)})
        except Exception as error:  # hostile files raise anything: FFmpegError, ValueError, UnicodeDecodeError…
            raise UserError(f"{name} is not a readable {kind} file; give {KNOWN[kind]}") from error
        with container:
            streams = [s for s in container.streams if s.type == kind and not _is_cover(s)]
            if not streams:
                raise UserError(f"{name} has no {kind} stream; give a file that has one")
            if streams[0].codec_context is None:
                raise UserError(f"{name} holds {kind} of a kind that PyAV cannot decode; give {KNOWN[kind]}")
            yield container, streams[0], name


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream in the order they are shown in, one at a time; broken packets give none."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()
        except av.error.FFmpegError:
            continue  # the next packet; after an error of the file itself there is none


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a picture that a music file carries as its cover."""
    return "attached_pic" in str(stream.disposition)


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


MOST_SECONDS = 600.0  # of a sound: 38 MB at 16 kHz


@dataclass(frozen=True)
class Audio:
    """A sound file, or the sound of a video file."""

    path: str | os.PathLike[str]

    def load(self, rate: int = 16_000) -> NDArray[np.float32]:
        """Samples [n] in [-1, 1], `rate` of them a second, the mean of all channels.

        UserError: the file is missing, broken, has no sound, or one longer than 10 minutes.
        """
        with opened(self.path, "audio") as (container, stream, name):
            from av import AudioResampler

            resampler = AudioResampler(format="fltp", rate=rate)
            pieces: list[NDArray[np.float32]] = []
            count = 0
            for frame in decoded(container, stream):
                pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(frame)]
                count += frame.samples
                if count > MOST_SECONDS * frame.sample_rate:
                    raise UserError(f"{name} is longer than {MOST_SECONDS:.0f} s; cut out the part that matters")
            if not pieces:
                raise UserError(f"{name} is broken: none of its sound can be decoded; save or download it again")
            pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(None)]
        return np.concatenate(pieces)
