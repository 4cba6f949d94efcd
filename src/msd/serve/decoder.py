"""Decodes untrusted media outside the server: each in a process of its own, with limits on memory, CPU and files.

`python -m msd.serve.decoder` is the helper process. It has loaded the decoders, and forks a child for every file; the
child sets its limits, decodes and ends. On its stdin it gets the kind (1 byte), the sampling rate of a sound or the
format of a recording (4 bytes), and the length (8 bytes) of a file, and the file; on its stdout it answers with a
status (1 byte), width and height (4 bytes each, or the length of a message and 0), and the RGB pixels or the message.
The frames of a video are stacked to one image; its `TAIL` follows. A sound has the width 1, its number of samples as
height, and float32 samples. A recording has the size of its sensor; `msd.serve.recordings` says what follows. No
objects are exchanged, so a file that takes over a child cannot reach the server with one.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from msd.errors import UserError
from msd.inputs.images import MAX_PIXELS, load_image
from msd.inputs.media import FRAMES, Audio, Video
from msd.serve import recordings

LENGTH, HEAD = struct.Struct(">BIQ"), struct.Struct(">BII")
TAIL = struct.Struct(f">dQ{FRAMES}Q")  # frames per second, number of all frames, and which of them were decoded
KINDS = ("image", "video", "audio", "recording")
OK, REFUSED = 0, 1
CPU_SECONDS = 10
MEMORY = 1500 * 1000**2  # of address space: 40 million pixels in several modes
OUTPUT = 130 * 1000**2  # 40 million RGB pixels
BROKEN = "it could not be decoded within the limits on time and memory; save it in another format, or resize it"


def main() -> None:
    """Serves files until stdin ends."""
    with suppress(ImportError):  # loaded once, for all children
        import av  # noqa: F401
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(LENGTH.size):
        kind, detail, length = LENGTH.unpack(head)
        data = source.read(length)
        with tempfile.TemporaryFile() as answer:
            child = os.fork()
            if child == 0:
                _decode(KINDS[kind], detail, data, answer)
            _, status = os.waitpid(child, 0)
            if status:
                _write(answer, REFUSED, BROKEN.encode())
            answer.seek(0)
            while piece := answer.read(1 << 20):
                sink.write(piece)
            sink.flush()


def _decode(medium: str, detail: int, data: bytes, answer: BinaryIO) -> None:
    """The child: limits itself, writes what it decoded or the reason why it did not, and exits. detail: see above."""
    try:
        for kind, most in (
            (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, OUTPUT),
            (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            resource.setrlimit(kind, (most, most))
        try:
            if medium == "video":
                _write(answer, OK, *_video(data))
            elif medium == "audio":
                with _stored(data) as path:
                    samples = Audio(path).load(detail)
                _write(answer, OK, samples.tobytes(), (1, len(samples)))
            elif medium == "recording":
                with _stored(data) as path:
                    _write(answer, OK, *recordings.packed(path, detail))
            else:
                image = load_image(data)
                _write(answer, OK, image.tobytes(), image.size)
        except UserError as error:
            _write(answer, REFUSED, str(error).encode())
        os._exit(0)
    except BaseException:
        os._exit(1)


def _video(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """(the pixels of all frames and the `TAIL`, the size of the stacked frames)."""
    with _stored(data) as path:
        clip = Video(path).load()
    width, height = clip.frames[0].size
    if width * height * FRAMES > MAX_PIXELS:
        raise UserError(f"{FRAMES} frames of {width}x{height} pixels are too many; resize it")
    pixels = b"".join(frame.tobytes() for frame in clip.frames)
    return pixels + TAIL.pack(clip.fps, clip.total, *clip.indices), (width, height * FRAMES)


@contextmanager
def _stored(data: bytes) -> Iterator[str]:
    """A path at which the file is, for this process only; a UserError says "it" instead of the path."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        path = f"/proc/self/fd/{file.fileno()}"
        try:
            yield path
        except UserError as error:
            raise UserError(str(error).replace(f"'{path}'", "it")) from error


def _write(answer: BinaryIO, status: int, body: bytes, size: tuple[int, int] | None = None) -> None:
    """Replaces the content of `answer`."""
    answer.seek(0)
    answer.truncate()
    answer.write(HEAD.pack(status, *(size or (len(body), 0))) + body)
    answer.flush()


if __name__ == "__main__":
    main()
