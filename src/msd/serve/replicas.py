"""Replicas: the same application several times in a Ray cluster, behind Ray Serve's proxies. Needs the extra `ray`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msd.serve.api import DRAIN_SECONDS
from msd.serve.guard import Guard

APPLICATION = "msd"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone, unless the user wants it

import ray  # noqa: E402
from ray import serve  # noqa: E402


@dataclass(frozen=True)
class Replicas:
    """How many replicas run, and where.

    least, most: replicas; between them, Ray scales by `load`. load: requests of a replica above which another one is
    started. requests: that a replica accepts at a time. cpus, gpus: that Ray reserves for each. more, fewer: seconds
    for which the load must have asked for more or fewer replicas.
    """

    least: int
    most: int
    load: int
    requests: int
    cpus: float = 1.0
    gpus: float = 0.0
    more: float = 30.0
    fewer: float = 600.0


def deploy(build: Callable[[], Guard], replicas: Replicas, host: str, port: int, seconds: float) -> None:
    """Starts the replicas and the proxies, and returns when all can be used.

    build: makes the application, with its model, in the process of each replica. seconds: of the longest request. The
    cluster is that of RAY_ADDRESS, or the one on this machine, or a new one. Every machine needs the same packages and
    files.
    """
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    serve.start(
        proxy_location="EveryNode", http_options={"host": host, "port": port, "request_timeout_s": seconds + 30}
    )

    def application() -> Guard:  # Ray takes functions only
        return build()

    @serve.ingress(application)
    class Replica:
        def check_health(self) -> None:
            """Called by Ray; an exception replaces the replica."""
            if not self.app.app.state.scheduler.accepting:  # type: ignore[attr-defined]
                raise RuntimeError("the scheduler does not run")

    amount: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        amount = {
            "autoscaling_config": {
                "min_replicas": replicas.least, "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.load,
                "upscale_delay_s": replicas.more, "downscale_delay_s": replicas.fewer,
            }
        }  # fmt: skip
    deployment = serve.deployment(
        Replica, name="model", max_ongoing_requests=replicas.requests, graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_period_s=5, ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}, **amount,
    )  # fmt: skip
    serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")


def stop() -> None:
    """Ends the replicas, whose running answers end first, and leaves the cluster."""
    serve.delete(APPLICATION)
    ray.shutdown()
