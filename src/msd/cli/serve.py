"""`msd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from msd.cli import options
from msd.errors import UserError

KEY = "MSD_API_KEY"


@options.grouped
def serve(
    drafting: options.Drafting,
    policy: options.Policy,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model for clients; by default that of the target.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help=f"Key that clients must send; repeatable. Also from {KEY}, which `ps` hides."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most answers that are decoded together.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Most requests that wait; then 429.")] = 64,
    cache_mb: Annotated[int, typer.Option("--cache-mb", min=1, help="Memory of keys and values, in MB.")] = 2000,
    deadline: Annotated[float, typer.Option("--deadline", min=1.0, help="Most seconds of a request.")] = 300.0,
    prefixes: Annotated[
        int, typer.Option("--prefixes", min=0, help="Prompts whose state is kept for prompts that continue them.")
    ] = 4,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-media-domain", help="Host that images may be fetched from, with :PORT if unusual; repeatable."
        ),
    ] = None,
    allow_media_folder: Annotated[
        Path | None, typer.Option("--allow-media-folder", help="Folder whose files clients may name as file:///PATH.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 512,
) -> None:
    """Serve a model over OpenAI's HTTP interface; Ctrl-C or SIGTERM lets running answers end."""
    try:
        import uvicorn

        from msd.serve.api import create
    except ImportError as error:
        raise UserError("`msd serve` needs more packages; pip install 'msd-decoding[serve]'") from error
    from msd.serve.scheduler import Limits, Scheduler
    from msd.serve.sources import Sources

    sources = Sources(allow_media_domain or (), allow_media_folder)
    target = drafting.target or "reference"
    vlm = options.load_vlm(target, drafting, **policy.checked())
    limits = Limits(rows, queue, cache_mb * 1000**2, deadline, prefixes)
    keys = tuple(key for key in [*(api_key or []), os.environ.get(KEY, "")] if key)
    app = create(Scheduler(vlm, limits), name or target, keys, max_new_tokens, sources=sources)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", server_header=False, timeout_keep_alive=10,
        h11_max_incomplete_event_size=32 * 1024, limit_concurrency=4 * (rows + queue), timeout_graceful_shutdown=30,
    )  # fmt: skip
