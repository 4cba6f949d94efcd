"""Has the files of requests decoded by `decoder`, in a process of its own, and keeps what was decoded."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msd.drafters import auxiliary
from msd.errors import UserError, named
from msd.events import EventStream
from msd.events.clip import event_clip
from msd.events.stream import DTYPES
from msd.inputs.images import MAX_PIXELS
from msd.inputs.media import FRAMES, Audio, Clip
from msd.serve import decoder, recordings
from msd.serve.schema import EventsUrl

SECONDS = 20.0  # of wall time for one file
MOST = 300 * 1000**2  # bytes of decoded pixels, samples and events of a request
KEPT = 200 * 1000**2  # bytes of decoded pixels, samples and events that are kept for requests with the same file


@dataclass(frozen=True, eq=False)
class Sound(Audio):
    """A sound that has been decoded. samples: [n] in [-1, 1], `rate` of them per second."""

    samples: NDArray[np.float32]
    rate: int

    def load(self, rate: int = 16_000) -> NDArray[np.float32]:
        """See `Audio`; UserError for another rate."""
        if rate != self.rate:
            raise UserError(f"{self.path} was decoded at {self.rate} samples per second, not {rate}")
        return self.samples


@dataclass(frozen=True, eq=False)
class Recorded(Clip):
    """The clip that a target sees of an event camera's recording, and its events."""

    events: EventStream


Medium = Image.Image | Clip | Sound


class Decoder:
    """The helper process, started at the first file and again after a failure. Thread-safe; one file at a time.

    rate: samples per second of the model's sounds; None if it takes none. frames: of the clip of a recording, where the
    request does not say.
    """

    def __init__(self, seconds: float = SECONDS, rate: int | None = None, frames: int = FRAMES) -> None:
        self.seconds, self.rate, self.frames, self._lock = seconds, rate, frames, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[tuple[str, bytes, str, int], Medium] = OrderedDict()

    def check(self, kinds: Iterable[str]) -> None:
        """UserError if the model takes no sounds and one of the kinds is "audio"."""
        if self.rate is None and "audio" in kinds:
            raise UserError("this model takes no sounds; leave them out")

    def media(
        self, parts: Sequence[tuple[str, str]], files: Sequence[bytes], recording: EventsUrl | None = None
    ) -> list[Medium]:
        """The media of a request. parts: (kind, address) of each file. UserError: see `decoder`.

        recording: what the request says of its recording.
        """
        out = list[Medium]()
        extension = "" if recording is None or recording.format is None else f".{recording.format}"
        frames = (None if recording is None else recording.frames) or self.frames
        for number, ((kind, address), data) in enumerate(zip(parts, files, strict=True), 1):
            name = f"{kind} {number}"
            if kind == "audio" and not address.startswith(f"data:audio/{_format(data)};"):
                raise UserError(f"{name} is not in the format that the request names; name its own, or convert it")
            out.append(self.medium(kind, data, name, extension, frames))
            if sum(map(_bytes, out)) > MOST:
                raise UserError(f"the media have more than {MOST // 10**6} MB of pixels together; resize them")
        return out

    def medium(
        self, kind: str, data: bytes, name: str = "image 1", extension: str = "", frames: int = FRAMES
    ) -> Medium:  # fmt: skip
        """Decodes a file, or takes it from the ones kept. extension, frames: of a recording; "": by its first bytes."""
        key = kind, hashlib.sha256(data).digest(), extension, frames
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            self._kept[key] = medium = self._decode(kind, data, name, extension, frames)
            while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > KEPT:
                self._kept.popitem(last=False)
            return medium

    def close(self) -> None:
        """Ends the helper process."""
        with self._lock:
            self._kill()

    def _decode(self, kind: str, data: bytes, name: str, extension: str, frames: int) -> Medium:
        """Has the helper decode a file; one that takes too long ends the helper."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.seconds, process.kill)
        timer.start()
        detail = recordings.FORMATS.index(extension) if kind == "recording" else self.rate or 0
        try:
            process.stdin.write(decoder.LENGTH.pack(decoder.KINDS.index(kind), detail, len(data)) + data)
            process.stdin.flush()
            status, first, second = decoder.HEAD.unpack(_exactly(process.stdout, decoder.HEAD.size))
            if status == decoder.OK and kind == "audio" and 4 * second <= decoder.OUTPUT:
                samples = np.frombuffer(_exactly(process.stdout, 4 * second), np.float32)
                return Sound("the sound", samples, self.rate or 0)
            if status == decoder.OK and kind == "recording":
                columns = _columns(process.stdout)
                with named(name):
                    return _recorded(columns, (first, second), frames)
            if status == decoder.OK and first * second <= MAX_PIXELS:
                image = Image.frombytes("RGB", (first, second), _exactly(process.stdout, 3 * first * second))
                return _clip(image, _exactly(process.stdout, decoder.TAIL.size)) if kind == "video" else image
            message = _exactly(process.stdout, min(first, 4096)).decode(errors="replace")
        except (OSError, EOFError) as error:
            self._kill()
            raise UserError(f"{name}: {decoder.BROKEN}") from error
        finally:
            timer.cancel()
        raise UserError(f"{name}: {message}")

    def _running(self) -> subprocess.Popen[bytes]:
        """The helper process."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "msd.serve.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _kill(self) -> None:
        """Ends the helper, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _clip(stacked: Image.Image, tail: bytes) -> Clip:
    """The video whose frames are stacked."""
    fps, total, *indices = decoder.TAIL.unpack(tail)
    width, height = stacked.width, stacked.height // len(indices)
    frames = (stacked.crop((0, i * height, width, (i + 1) * height)) for i in range(len(indices)))
    return Clip(tuple(frames), tuple(indices), total, fps)


def _columns(stream: IO[bytes]) -> dict[str, NDArray[Any]]:
    """The columns of the events that the helper has read."""
    (count,) = recordings.COUNT.unpack(_exactly(stream, recordings.COUNT.size))
    if count > recordings.MOST:
        raise EOFError
    return {n: np.frombuffer(_exactly(stream, count * np.dtype(d).itemsize), d) for n, d in DTYPES.items()}


def _recorded(columns: dict[str, NDArray[Any]], size: tuple[int, int], frames: int) -> Recorded:
    """Draws a recording. UserError: these are no events of this sensor, or it has too many pixels for the frames."""
    most = max(frames, auxiliary.FRAMES)
    if size[0] * size[1] * most > MAX_PIXELS:
        raise UserError(f"{most} frames of {size[0]}x{size[1]} pixels are too many; crop it")
    events = EventStream(**columns, size=size)
    return Recorded(**vars(event_clip(events, frames)), events=events)


def _bytes(medium: Medium) -> int:
    """Bytes of the decoded pixels, samples or events."""
    if isinstance(medium, Sound):
        return medium.samples.nbytes
    pixels = sum(3 * i.width * i.height for i in (medium.frames if isinstance(medium, Clip) else [medium]))
    return pixels + sum(getattr(medium.events, n).nbytes for n in DTYPES if isinstance(medium, Recorded))


def _format(data: bytes) -> str | None:
    """The format of a sound file by its first bytes: "wav", "mp3", or None for any other."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    return "mp3" if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0") else None


def _exactly(stream: IO[bytes], count: int) -> bytes:
    """Reads `count` bytes; EOFError if there are fewer."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
