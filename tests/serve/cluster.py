"""`msd serve --ray` in a Ray cluster of local nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM
from serve.server import asks, data_uri, picture

WAIT = 900.0  # seconds; a machine may be busy with other work
CLIENTS, QUESTIONS, TOKENS = 3, 8, 160
ROOT = Path(__file__).parents[2]
PATIENT = {  # a slow machine is no broken proxy
    f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": str(WAIT) for check in ("READY", "HEALTH")
}


@contextmanager
def serving(target: Path, cores: list[int], folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """The address of a server, which must end without an error. cores: of each node. folder: for its log."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **PATIENT, **environment}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
        head, *others = [{"num_cpus": count, "object_store_memory": 100 * 2**20} for count in cores]
        cluster = started(lambda: Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False}))
        for node in others:
            started(partial(cluster.add_node, **node))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "msd", "serve", "--ray", *options, "--port", str(port), "--name", "tiny",
            "--target", str(target), "--method", "prompt-lookup",
        ]  # fmt: skip
        patch.setenv("RAY_ADDRESS", cluster.address)
        log = folder / "log"
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            wait(lambda: server.poll() is not None or b" replicas on" in log.read_bytes())
            assert server.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGTERM)
            assert server.wait(WAIT) == 0, log.read_text()
        finally:
            server.kill()
            ray.shutdown()
            cluster.shutdown()


def started(start: Callable[[], Any]) -> Any:
    """Starts a node; again if it took longer than the 30 s that Ray gives it."""
    until = time.monotonic() + WAIT
    while True:
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error) or time.monotonic() > until:
                raise


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def replicas() -> set[str]:
    """The names of the replicas' actors."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::msd#")}


def states() -> dict[str, int]:
    """The number of replicas in each state."""
    return dict(serve.status().applications["msd"].deployments["model"].replica_states)


def body(number: int) -> dict[str, Any]:
    """A question, greedy or sampled, with or without an image."""
    images = [data_uri(picture(number % 3))] if number % 2 else []
    settings = {"temperature": 0.0} if number % 3 else {"temperature": 0.9, "seed": number}
    return {"model": "tiny", "messages": asks(f"Question {number}?", *images), "max_tokens": TOKENS, **settings}


def retried(address: str, question: dict[str, Any], tries: list[int]) -> str:
    """The answer to a request that is sent again until it is answered."""
    until = time.monotonic() + WAIT
    while True:
        assert time.monotonic() < until
        try:
            answer = httpx2.post(f"{address}/v1/chat/completions", json=question, timeout=WAIT)
        except httpx2.HTTPError:
            answer = None
        tries.append(0 if answer is None else answer.status_code)
        if answer is not None and answer.status_code == 200:
            return answer.json()["choices"][0]["message"]["content"]
        time.sleep(0.2)


def wanted(target: Path) -> list[str]:
    """All answers, computed alone in this process."""
    vlm = SpeculativeVLM.from_pretrained(target, "ar", SpeculativeConfig(adaptive=False))
    texts = []
    for number in range(QUESTIONS):
        asked = body(number)
        sampled = {"do_sample": True, "temperature": 0.9, "top_k": 0} if number % 3 == 0 else {}
        answer = vlm.generate(messages=asked["messages"], seed=[number], max_new_tokens=TOKENS, **sampled)
        texts.append(answer.text)
    return texts


class Load:
    """Clients that send questions until they are told to end."""

    def __init__(self, address: str, after: int) -> None:
        """after: questions that each client still sends then."""
        self.address, self.after, self.answers, self.tries = address, after, list[tuple[int, str]](), list[int]()
        self.ending = threading.Event()
        self.clients = [threading.Thread(target=self._ask, args=(i,)) for i in range(CLIENTS)]
        for client in self.clients:
            client.start()

    def _ask(self, number: int) -> None:
        left = self.after
        while left or not self.ending.is_set():
            left -= self.ending.is_set()
            self.answers.append((number, retried(self.address, body(number), self.tries)))
            number = (number + CLIENTS) % QUESTIONS

    def end(self, target: Path) -> None:
        """Ends the clients. Every request has been answered, as the target answers it alone."""
        self.ending.set()
        for client in self.clients:
            client.join(WAIT)
        right = wanted(target)
        assert [text for _, text in self.answers] == [right[number] for number, _ in self.answers]
        assert self.tries.count(200) == len(self.answers) >= QUESTIONS + CLIENTS * self.after
