"""`msd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msd.cli import options
from msd.errors import UserError

if TYPE_CHECKING:
    from msd.serve.guard import Guard

KEY = "MSD_API_KEY"


@dataclass(frozen=True)
class Served:
    """What is served, and within which limits."""

    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model for clients; by default that of the target.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help=f"Key that clients must send; repeatable. Also from {KEY}, which `ps` hides."),
    ] = None
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most answers that are decoded together.")] = 16
    queue: Annotated[int, typer.Option("--queue", min=1, help="Most requests that wait; then 429.")] = 64
    cache_mb: Annotated[int, typer.Option("--cache-mb", min=1, help="Memory of keys and values, in MB.")] = 2000
    deadline: Annotated[float, typer.Option("--deadline", min=1.0, help="Most seconds of a request.")] = 300.0
    prefixes: Annotated[
        int, typer.Option("--prefixes", min=0, help="Prompts whose state is kept for prompts that continue them.")
    ] = 4
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-media-domain", help="Host that media may be fetched from, with :PORT if unusual; repeatable."
        ),
    ] = None
    allow_media_folder: Annotated[
        Path | None, typer.Option("--allow-media-folder", help="Folder whose files clients may name as file:///PATH.")
    ] = None
    max_new_tokens: options.MaxNewTokens = 512

    @property
    def connections(self) -> int:
        """Requests that a process accepts at a time, those that are refused among them."""
        return 4 * (self.rows + self.queue)

    def application(self, drafting: options.Drafting, policy: options.Policy, keys: tuple[str, ...]) -> Guard:
        """Loads the model, and returns its application."""
        from msd.serve.api import create
        from msd.serve.scheduler import Limits, Scheduler
        from msd.serve.sources import Sources

        sources = Sources(self.allow_media_domain or (), self.allow_media_folder)
        target = drafting.target or "reference"
        vlm = options.load_vlm(target, drafting, **policy.checked())
        limits = Limits(self.rows, self.queue, self.cache_mb * 1000**2, self.deadline, self.prefixes)
        frames, name = options.frames_for(target), self.name or target
        gc.collect()
        gc.freeze()  # what has been loaded stays: a full collection over it would stop all requests for 0.2 s
        return create(Scheduler(vlm, limits), name, keys, self.max_new_tokens, sources=sources, frames=frames)


@dataclass(frozen=True)
class Cluster:
    """Several replicas in a Ray cluster."""

    ray: Annotated[bool, typer.Option("--ray", help="Serve with Ray Serve, in the cluster of RAY_ADDRESS.")] = False
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, help="With --ray: replicas; 1.")] = None
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", min=1, help="With --ray: as many under load; by default --replicas.")
    ] = None
    replica_cpus: Annotated[
        float | None, typer.Option("--replica-cpus", min=0.1, help="With --ray: cores of each replica; 1.")
    ] = None
    upscale_delay: Annotated[
        float | None, typer.Option("--upscale-delay", min=0.0, help="With --max-replicas: seconds of high load; 30.")
    ] = None
    downscale_delay: Annotated[
        float | None, typer.Option("--downscale-delay", min=0.0, help="With --max-replicas: seconds of low load; 600.")
    ] = None

    def check(self) -> None:
        """Raises UserError for options that do not belong together."""
        delays = {"upscale-delay": self.upscale_delay, "downscale-delay": self.downscale_delay}
        given = {"replicas": self.replicas, "max-replicas": self.max_replicas, "replica-cpus": self.replica_cpus}
        for name, value in delays.items():
            if value is not None and (self.max_replicas or 0) <= (self.replicas or 1):
                raise UserError(f"--{name} is for --max-replicas above --replicas; add it, or leave --{name} out")
        if not self.ray and (wrong := next((name for name, value in given.items() if value is not None), None)):
            raise UserError(f"--{wrong} is for --ray; add it, or leave --{wrong} out")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise UserError(f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas or 1}")


@options.grouped
def serve(
    drafting: options.Drafting,
    policy: options.Policy,
    served: Served,
    cluster: Cluster,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve a model over OpenAI's HTTP interface; Ctrl-C or SIGTERM lets running answers end."""
    cluster.check()
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError("`msd serve` needs more packages; pip install 'msd-decoding[serve]'") from error
    keys = tuple(key for key in [*(served.api_key or []), os.environ.get(KEY, "")] if key)
    if cluster.ray:
        _serve_replicas(drafting, policy, served, cluster, keys, (host, port))
        return
    with _bound(host, port) as place:
        config = uvicorn.Config(
            served.application(drafting, policy, keys), log_level="warning", server_header=False,
            timeout_keep_alive=10, h11_max_incomplete_event_size=32 * 1024, limit_concurrency=served.connections,
            timeout_graceful_shutdown=30,
        )  # fmt: skip
        place.listen()
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{shown}:{port} answers now; Ctrl-C ends it", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[place])


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, before a model is loaded; UserError where that is impossible."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}); choose others with --host and --port"
        ) from error
    return place


def _serve_replicas(
    drafting: options.Drafting, policy: options.Policy, served: Served, cluster: Cluster, keys: tuple[str, ...],
    address: tuple[str, int],
) -> None:  # fmt: skip
    """Runs replicas in a Ray cluster until SIGTERM or Ctrl-C."""
    try:
        from msd.serve.replicas import Replicas, deploy, stop
    except ImportError as error:
        raise UserError("`msd serve --ray` needs Ray; pip install 'msd-decoding[ray]'") from error
    policy.checked()
    least = cluster.replicas or 1
    delays = {"more": cluster.upscale_delay, "fewer": cluster.downscale_delay}
    replicas = Replicas(
        least, cluster.max_replicas or least, served.rows, served.connections, cluster.replica_cpus or 1.0,
        gpus=float((drafting.device or "").startswith("cuda")),
        **{name: seconds for name, seconds in delays.items() if seconds is not None},
    )  # fmt: skip
    ended = threading.Event()
    try:
        deploy(lambda: served.application(drafting, policy, keys), replicas, *address, served.deadline)
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own handlers
            signal.signal(number, lambda *_: ended.set())
        typer.echo(f"{least} replicas on http://{address[0]}:{address[1]}", err=True)
        ended.wait()
    finally:
        stop()
