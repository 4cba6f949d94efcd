"""A server of a tiny model on a free port of this machine, in a thread."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image

import tiny
import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM
from msd.serve.api import create
from msd.serve.guard import Guard
from msd.serve.scheduler import Limits, Scheduler
from msd.serve.sources import Sources

NAME = "tiny"


def engine() -> SpeculativeVLM:
    """A tiny LLaVA with a token per byte."""
    model = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256, sharpness=10.0)
    return SpeculativeVLM(model, tiny_checkpoint.processor(), SpeculativeConfig(adaptive=False), "prompt-lookup")


@contextmanager
def running(
    vlm: SpeculativeVLM, keys: tuple[str, ...] = (), sources: Sources | None = None, **limits: Any
) -> Iterator[tuple[str, Guard, Scheduler]]:
    """(the address, the application, its scheduler)."""
    scheduler = Scheduler(vlm, Limits(**limits))
    app = create(scheduler, NAME, keys, most=16, drain=0.0, sources=sources)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", server_header=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", app, scheduler
    finally:
        server.should_exit = True
        thread.join(60)


def picture(seed: int = 0, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.effect_mandelbrot(size, (-2.0, -1.5 - seed / 10, 1.0, 1.5), 50).convert("RGB").save(file, kind)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asks(text: str, *uris: str) -> list[dict[str, Any]]:
    """Messages of one turn."""
    shown = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
