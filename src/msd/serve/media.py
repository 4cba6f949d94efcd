"""Images of requests: data URIs only, within limits that hold before anything is decoded, decoded by `decoder`.

Nothing is fetched and no local file is opened: an address that is not a data URI is refused, so there is no address to
check, no redirect to follow and no resolution to pin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO

from PIL import Image

from msd.errors import UserError
from msd.inputs.images import MAX_BYTES, MAX_PIXELS
from msd.serve import decoder

SECONDS = 20.0  # of wall time for one image
TOTAL = 2 * MAX_BYTES  # bytes of all images of a request
KEPT = 200 * 1000**2  # bytes of decoded pixels that are kept for requests with the same image


def data_of(uri: str, number: int) -> bytes:
    """The file in a base64 data URI. UserError for any other address; the message does not repeat it."""
    name = f"image {number}"
    head, comma, body = uri.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise UserError(f"{name} is not a data URI, and this server fetches nothing; send data:image/…;base64,…")
    if not head.lower().endswith(";base64"):
        raise UserError(f"{name} is a data URI without base64; send data:image/…;base64,…")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise UserError(f"{name} is larger than {MAX_BYTES // 10**6} MB; compress or resize it")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is not valid base64; encode the file again") from error


class Decoder:
    """The helper process, started at the first image and again after a failure. Thread-safe; one image at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[bytes, Image.Image] = OrderedDict()

    def images(self, uris: Sequence[str], cancelled: Callable[[], bool] = lambda: False) -> list[Image.Image]:
        """The RGB images of a request. UserError for the first one that is refused."""
        files = [data_of(uri, number) for number, uri in enumerate(uris, 1)]
        if sum(map(len, files)) > TOTAL:
            raise UserError(f"the images are larger than {TOTAL // 10**6} MB together; compress or resize them")
        return [self.image(data, number) for number, data in enumerate(files, 1) if not cancelled()]

    def image(self, data: bytes, number: int = 1) -> Image.Image:
        """Decodes an image file, or takes it from the ones kept."""
        key = hashlib.sha256(data).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            image = self._decode(data, number)
            self._kept[key] = image
            while len(self._kept) > 1 and sum(3 * i.width * i.height for i in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
            return image

    def close(self) -> None:
        """Ends the helper process."""
        with self._lock:
            self._kill()

    def _decode(self, data: bytes, number: int) -> Image.Image:
        """Has the helper decode an image; one that takes too long ends the helper."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(decoder.LENGTH.pack(len(data)) + data)
            process.stdin.flush()
            status, first, second = decoder.HEAD.unpack(_exactly(process.stdout, decoder.HEAD.size))
            if status == decoder.OK and first * second <= MAX_PIXELS:
                return Image.frombytes("RGB", (first, second), _exactly(process.stdout, 3 * first * second))
            message = _exactly(process.stdout, min(first, 4096)).decode(errors="replace")
        except (OSError, EOFError) as error:
            self._kill()
            raise UserError(f"image {number}: {decoder.BROKEN}") from error
        finally:
            timer.cancel()
        raise UserError(f"image {number}: {message}")

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


def _exactly(stream: IO[bytes], count: int) -> bytes:
    """Reads `count` bytes; EOFError if there are fewer."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
