"""Opening films and sounds with PyAV, trusting nothing of what a file says.

Only the formats named here are tried, so that a playlist (HLS, DASH, concat) cannot make the library open other files
or addresses. A packet that cannot be decoded is left out; whatever else a broken file raises becomes one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msd.errors import UserError
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
