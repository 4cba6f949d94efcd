"""The HTTP interface: OpenAI's chat completions and models, health, metrics and version."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from msd import __version__
from msd.inputs.media import FRAMES
from msd.serve import site
from msd.serve.completions import INTERNAL, Completions
from msd.serve.errors import ErrorBody, HTTPError
from msd.serve.guard import HEALTH, Guard
from msd.serve.metrics import Metrics
from msd.serve.scheduler import Scheduler
from msd.serve.schema import Completion
from msd.serve.sources import Sources

DRAIN_SECONDS = 30.0
ERRORS: dict[int | str, dict[str, Any]] = {
    kind: {"model": ErrorBody, "description": text}
    for kind, text in (("4XX", "The request was refused."), ("5XX", "The server failed."))
}
STREAM = "text/event-stream"


def create(
    scheduler: Scheduler,
    name: str,
    keys: tuple[str, ...] = (),
    most: int = 512,
    drain: float = DRAIN_SECONDS,
    sources: Sources | None = None,
    frames: int = FRAMES,
) -> Guard:
    """The ASGI application of a scheduler, which it starts and drains. name: of the model. most: default max_tokens.

    sources: where media may come from besides data URIs; by default from nowhere. frames: that the target sees of a
    recording, where the request does not say.
    """
    metrics = Metrics(scheduler, name)
    completions = Completions(scheduler, metrics, name, most, sources or Sources(), frames)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.drain(drain)
        completions.close()

    app = FastAPI(
        title="MSD", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS
    )  # fmt: skip
    app.state.scheduler = scheduler
    _add_errors(app)
    _add_status(app, scheduler, metrics, name)
    site.add(app, completions)

    @app.post("/v1/chat/completions", response_model=None, responses={200: {"content": {STREAM: {}}}})
    async def chat_completions(body: Completion, request: Request) -> Response:
        """Answers a chat about images; with `stream`, as server-sent events."""
        running = await completions.start(body)
        if body.stream:
            return StreamingResponse(running.events(), media_type=STREAM)
        whole = await running.whole(request.is_disconnected)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    return Guard(app, keys, open=(*HEALTH, *site.FILES))


def _add_status(app: FastAPI, scheduler: Scheduler, metrics: Metrics, name: str) -> None:
    """Adds the paths that tell about the server."""
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "msd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted}", response_model=None)
    async def one_model(wanted: str) -> dict[str, Any]:
        """The served model, by its name."""
        if wanted != name:
            raise HTTPError(404, f"this server has the model '{name}'", "model", "model_not_found")
        return model

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", response_model=None, responses={503: {"description": "The server is stopping."}})
    async def ready() -> JSONResponse:
        """Whether requests are taken: 200 or 503."""
        ready = scheduler.accepting
        return JSONResponse({"status": "ready" if ready else "draining"}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """The metrics in Prometheus' text format."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of MSD."""
        return {"version": __version__}


def _add_errors(app: FastAPI) -> None:
    """Gives every error OpenAI's shape, without anything from inside the program."""

    def answered(failure: HTTPError) -> JSONResponse:
        return JSONResponse(failure.body(), failure.status, failure.headers)

    @app.exception_handler(HTTPError)
    async def refused(_: Request, failure: HTTPError) -> JSONResponse:
        return answered(failure)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda problem: len(problem["loc"]))  # of the parts of a union, the one meant
        place = (str(part) for part in first["loc"] if part != "body")
        param = ".".join(part for part in place if "[" not in part)[:200] or None
        message = "is not supported; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        return answered(HTTPError(400, f"{param or 'the body'}: {message}"[:1000], param))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return answered(HTTPError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return answered(HTTPError(500, INTERNAL))
