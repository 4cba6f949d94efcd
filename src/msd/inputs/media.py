"""Decodes videos and sounds with PyAV, and treats every file as hostile.

Only the formats in `FORMATS` are tried: playlists (HLS, DASH, concat) could make the library open other files or
addresses. Packets that cannot be decoded are skipped; all other errors become UserErrors.
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
FRAMES = 8  # as in the training of Video-LLaVA (arXiv 2311.10122)
CLIP_FRAMES = 4  # as in the training of the target "reference-video"
MOST_FRAMES = 512  # per request
MOST_PACKETS = 500_000  # of a file: more than two hours at 60 frames a second
MOST_PIXELS = 256 * 1000 * 1000  # of all selected frames together
MOST_SECONDS = 600.0  # of a sound: 38 MB at 16 kHz


@dataclass(frozen=True)
class Clip:
    """Decoded frames of a video.

    indices: their numbers among the `total` frames of the video. fps: average frame rate of the video.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float


@dataclass(frozen=True)
class Video:
    """A video file, of which `frames` evenly spaced frames are used."""

    path: str | os.PathLike[str]
    frames: int = FRAMES

    def load(self) -> Clip:
        """Decodes `self.frames` frames evenly spaced in time, the first and the last frame of the video among them.

        They are RGB images in order, rotated as the file's metadata requests. If the video has fewer frames than that,
        some occur twice. Raises UserError: the file is missing, not a video, has no frame that can be decoded, or has
        more pixels than the limits of this module.
        """
        if not 1 <= self.frames <= MOST_FRAMES:
            raise UserError(f"{self.frames} frames of a video; ask for 1 to {MOST_FRAMES}")
        with _opened(self.path, "video") as (container, stream, name):
            estimate = _packet_times(container, stream, name)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS or width * height * self.frames > MOST_PIXELS:
                raise UserError(
                    f"{name} is {width}x{height} pixels, too large for {self.frames} frames; resize it or ask for fewer"
                )
            rate = float(stream.average_rate or 0)
            base = float(stream.time_base or 0)
        selected, times = self._decode(set(evenly(_ascending(estimate), self.frames)))
        display_times = _ascending(times)
        indices = evenly(display_times, self.frames)
        if not set(indices) <= selected.keys():  # the packet times differ from those of the decoded frames
            selected, _ = self._decode(set(indices))
        duration = (display_times[-1] - display_times[0]) * base
        fps = (len(times) - 1) / duration if display_times == times and base and len(times) > 1 else rate
        return Clip(tuple(selected[i] for i in indices), tuple(indices), len(times), fps or 1.0)

    def _decode(self, wanted: set[int]) -> tuple[dict[int, Image.Image], list[int | None]]:
        """Returns (the wanted frames by number, the display time of every frame in units of the stream's time base)."""
        selected: dict[int, Image.Image] = {}
        times: list[int | None] = []
        with _opened(self.path, "video") as (container, stream, name):
            stream.thread_type = "AUTO"
            for frame in _decoded(container, stream):
                if frame.width * frame.height > MAX_PIXELS:
                    raise UserError(f"{name} holds a frame of {frame.width}x{frame.height} pixels; resize it")
                if len(times) in wanted:
                    selected[len(times)] = frame.to_image().rotate(frame.rotation, expand=True)
                times.append(frame.pts)
            if not times:
                raise UserError(f"{name} is broken: none of its frames can be decoded; save or download it again")
        size = next((image.size for image in selected.values()), (0, 0))
        return {n: image if image.size == size else image.resize(size) for n, image in selected.items()}, times


@dataclass(frozen=True)
class Audio:
    """A sound file, or the sound of a video file."""

    path: str | os.PathLike[str]

    def load(self, rate: int = 16_000) -> NDArray[np.float32]:
        """Decodes samples [n] in [-1, 1] at `rate` samples per second, averaged over channels.

        UserError: the file is missing, broken, has no sound, or is longer than 10 minutes.
        """
        with _opened(self.path, "audio") as (container, stream, name):
            from av import AudioResampler

            resampler = AudioResampler(format="fltp", rate=rate)
            pieces: list[NDArray[np.float32]] = []
            count = 0
            for frame in _decoded(container, stream):
                pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(frame)]
                count += frame.samples
                if count > MOST_SECONDS * frame.sample_rate:
                    raise UserError(f"{name} is longer than {MOST_SECONDS:.0f} s; cut out the part that matters")
            if not pieces:
                raise UserError(f"{name} is broken: none of its sound can be decoded; save or download it again")
            pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(None)]
        return np.concatenate(pieces)


def evenly(times: list[int], count: int) -> list[int]:
    """Returns the numbers of the frames on screen at `count` evenly spaced times. times: ascending start of each."""
    if count == 1:
        return [0]
    wanted = np.linspace(times[0], times[-1], count)
    numbers: list[int] = (np.searchsorted(times, wanted + 1e-3, side="right") - 1).tolist()
    return numbers


@contextmanager
def _opened(source: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, Any, str]]:
    """Opens a file as (container, its first stream of `kind`, name for messages). kind: "video" or "audio".

    UserError: PyAV is not installed, the path is no regular file, or it has no such stream.
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
            # a picture that a music file contains as its cover is no video
            streams = [s for s in container.streams if s.type == kind and "attached_pic" not in str(s.disposition)]
            if not streams:
                raise UserError(f"{name} has no {kind} stream; give a file that has one")
            if streams[0].codec_context is None:
                raise UserError(f"{name} holds {kind} of a kind that PyAV cannot decode; give {KNOWN[kind]}")
            yield container, streams[0], name


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the frames of a stream in display order; skips broken packets."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()
        except av.error.FFmpegError:
            continue  # after an error of the file itself there is no next packet


def _packet_times(container: Any, stream: Any, name: str) -> list[int | None]:
    """Returns the display times of all packets, sorted if all are known, without discarded packets."""
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
    """Returns the times; if any is missing, they decrease, or all are equal, the frame numbers instead."""
    known = [time for time in times if time is not None]
    if len(known) == len(times) and known[-1] > known[0] and all(a <= b for a, b in pairwise(known)):
        return known
    return list(range(len(times)))
