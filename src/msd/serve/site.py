"""The page at `/`, its files, and what it asks besides answers: settings, frames of a recording, gain of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from msd.inspect import COLOURS, OTHER
from msd.serve.completions import Completions
from msd.serve.drawn import drawn
from msd.serve.gains import Measured, measure
from msd.serve.recordings import FORMATS
from msd.serve.schema import About

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INDEX = "index.html"
# every file by its path; they hold nothing secret, so a browser gets them without an API key
FILES = {"/" if file.name == INDEX else f"/page/{file.name}": file for file in sorted(FOLDER.iterdir())}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def add(app: FastAPI, completions: Completions) -> None:
    """Adds the page and its paths to a server."""
    for path, file in FILES.items():
        app.add_api_route(path, _reader(file), methods=["GET"], response_model=None, include_in_schema=False)

    @app.get("/v1/msd")
    async def settings() -> dict[str, Any]:
        """How this server decodes, and the colours of the modalities."""
        return _settings(completions)

    @app.post("/v1/msd/gain", response_model=None)
    async def gain(body: Measured, request: Request) -> Response:
        """The information gain of the image at each token of an answer."""
        measured = await measure(completions, body, request.is_disconnected)
        return Response(status_code=499) if measured is None else JSONResponse(measured)

    @app.post("/v1/msd/frames", response_model=None)
    async def frames(body: About) -> Response:
        """The frames that the target sees of a recording."""
        return JSONResponse(await drawn(completions, body))


def _reader(file: Path) -> Any:
    """A handler that answers with a file, which is read once."""
    text, kind = file.read_bytes(), f"{TYPES[file.suffix]}; charset=utf-8"

    async def read() -> Response:
        return Response(text, media_type=kind, headers={"content-security-policy": POLICY})

    return read


def _settings(completions: Completions) -> dict[str, Any]:
    """What the page shows of a server. events: whether the drafter reads them. formats: extensions of recordings.

    crop: whether the model sees only the square in the middle of an image.
    """
    vlm = completions.scheduler.vlm
    return {
        "model": completions.name, "method": vlm.drafter.name, "policy": vlm.config.verifier,
        "epsilon": vlm.config.epsilon,
        "events": getattr(vlm.drafter, "auxiliary_source", None) == "events",
        "crop": bool(getattr(getattr(vlm.processor, "image_processor", None), "do_center_crop", False)),
        "formats": list(FORMATS[1:]), "colours": COLOURS, "other": OTHER,
    }  # fmt: skip
