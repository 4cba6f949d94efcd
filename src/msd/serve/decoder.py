"""Decodes untrusted images outside the server: each in a process of its own, with limits on memory, CPU and files.

`python -m msd.serve.decoder` is the helper process. It has loaded the decoders, and forks a child for every image; the
child sets its limits, decodes and ends. On its stdin it gets the length of an image file (8 bytes) and the file; on its
stdout it answers with a status (1 byte), width and height (4 bytes each, or the length of a message and 0), and the RGB
pixels or the message. No objects are exchanged, so an image that takes over a child cannot reach the server with one.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import tempfile
from typing import BinaryIO

from msd.errors import UserError
from msd.inputs.images import load_image

LENGTH, HEAD = struct.Struct(">Q"), struct.Struct(">BII")
OK, REFUSED = 0, 1
CPU_SECONDS = 10
MEMORY = 1500 * 1000**2  # of address space: 40 million pixels in several modes
OUTPUT = 130 * 1000**2  # 40 million RGB pixels
BROKEN = "an image could not be decoded within the limits on time and memory; save it as PNG or JPEG, or resize it"


def main() -> None:
    """Serves images until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(LENGTH.size):
        data = source.read(LENGTH.unpack(head)[0])
        with tempfile.TemporaryFile() as answer:
            child = os.fork()
            if child == 0:
                _decode(data, answer)
            _, status = os.waitpid(child, 0)
            if status:
                _write(answer, REFUSED, BROKEN.encode())
            answer.seek(0)
            while piece := answer.read(1 << 20):
                sink.write(piece)
            sink.flush()


def _decode(data: bytes, answer: BinaryIO) -> None:
    """The child: limits itself, writes the pixels or the reason why there are none, and exits."""
    try:
        for kind, most in (
            (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, OUTPUT),
            (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            resource.setrlimit(kind, (most, most))
        try:
            image = load_image(data)
            _write(answer, OK, image.tobytes(), image.size)
        except UserError as error:
            _write(answer, REFUSED, str(error).encode())
        os._exit(0)
    except BaseException:
        os._exit(1)


def _write(answer: BinaryIO, status: int, body: bytes, size: tuple[int, int] | None = None) -> None:
    """Replaces the content of `answer`."""
    answer.seek(0)
    answer.truncate()
    answer.write(HEAD.pack(status, *(size or (len(body), 0))) + body)
    answer.flush()


if __name__ == "__main__":
    main()
