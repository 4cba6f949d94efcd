"""`msd serve` as a process: what it does when it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")

import tiny_checkpoint  # noqa: E402
from msd.cli.serve import Cluster  # noqa: E402
from msd.errors import UserError  # noqa: E402
from serve.server import NAME, asks, engine  # noqa: E402

NEW = 300


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(its address, the process), which takes requests."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder, home = tiny_checkpoint.write(tmp_path / "target"), {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["serve", "--target", str(folder), "--method", "ar", "--backend", "plain"]
    command += ["--port", str(port), "--name", NAME]
    made = subprocess.Popen([sys.executable, "-m", "msd", *command], env={**os.environ, **home})
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert made.poll() is None
            try:
                if httpx2.get(f"{address}/health/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.1)
        yield address, made
    finally:
        made.kill()
        made.wait()


@pytest.mark.slow
def test_a_running_answer_ends_after_sigterm_and_then_the_process(
    process: tuple[str, subprocess.Popen[bytes]],
) -> None:
    address, made = process
    body = {"model": NAME, "messages": asks("Go on"), "temperature": 0, "max_tokens": NEW, "stream": True}
    pieces: list[str] = []
    with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=300) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        for line in lines:
            if line == "[DONE]":
                break
            delta = json.loads(line)["choices"][0]["delta"]
            pieces.append(delta.get("content", ""))
            if sum(map(bool, pieces)) == 1:  # the first text
                made.send_signal(signal.SIGTERM)
        else:
            pytest.fail("the stream was cut")
    assert "".join(pieces) == engine().generate(messages=asks("Go on"), max_new_tokens=NEW).text
    assert made.wait(300) in (0, -signal.SIGTERM)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{address}/health/live")


def test_options_of_replicas_that_would_have_no_effect_are_refused() -> None:
    for options, said in (
        ({"replicas": 2}, "--replicas is for --ray"),
        ({"ray": True, "upscale_delay": 5.0}, "--upscale-delay is for --max-replicas"),
        ({"ray": True, "replicas": 2, "max_replicas": 2, "downscale_delay": 5.0}, "--downscale-delay is for"),
        ({"ray": True, "replicas": 2, "max_replicas": 1}, "is less than --replicas 2"),
    ):
        with pytest.raises(UserError, match=said):
            Cluster(**options).check()  # type: ignore[arg-type]
    Cluster(ray=True, max_replicas=2, upscale_delay=5.0, downscale_delay=5.0).check()
