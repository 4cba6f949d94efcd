"""`msd serve --ray` in a cluster of two local nodes: a replica that dies under load loses no retried request."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")
import httpx2
import ray

import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.model import SpeculativeVLM
from serve.server import asks, data_uri, picture

pytestmark = pytest.mark.slow
CLIENTS, QUESTIONS, AFTER, TOKENS = 3, 8, 4, 160
WAIT = 280.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def address(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas, one on each node."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "msd", "serve", "--ray", "--replicas", "2", "--max-replicas", "3",
            "--port", str(port), "--name", "tiny",
            "--target", str(target), "--method", "prompt-lookup",
        ]  # fmt: skip
        patch.setenv("RAY_ADDRESS", cluster.address)
        log = tmp_path_factory.mktemp("ray") / "log"
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            wait(lambda: server.poll() is not None or b"2 replicas on" in log.read_bytes())
            assert server.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGTERM)
            assert server.wait(WAIT) == 0, log.read_text()
        finally:
            server.kill()
            ray.shutdown()
            cluster.shutdown()


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def replicas() -> set[str]:
    """The names of the replicas' actors."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::msd#")}


def body(number: int) -> dict[str, Any]:
    images = [data_uri(picture(number % 3))] if number % 2 else []
    settings = {"temperature": 0.0} if number % 3 else {"temperature": 0.9, "seed": number}
    return {"model": "tiny", "messages": asks(f"Question {number}?", *images), "max_tokens": TOKENS, **settings}


def retried(address: str, number: int, tries: list[int]) -> str:
    """The answer to a request that is sent again until it is answered."""
    until = time.monotonic() + WAIT
    while True:
        assert time.monotonic() < until
        try:
            answer = httpx2.post(f"{address}/v1/chat/completions", json=body(number), timeout=WAIT)
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


def test_a_replica_killed_under_load_loses_no_request(address: str, target: Path) -> None:
    before = replicas()
    assert len(before) == 2
    answers: list[tuple[int, str]] = []
    tries: list[int] = []
    killed = threading.Event()

    def client(number: int) -> None:
        """Sends requests until the replica has been killed, and then some more."""
        left = AFTER
        while left:
            left -= killed.is_set()
            answers.append((number, retried(address, number, tries)))
            number = (number + CLIENTS) % QUESTIONS

    clients = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in clients:
        thread.start()
    wait(lambda: len(answers) >= QUESTIONS)
    gone = min(before)
    ray.kill(ray.get_actor(gone, namespace="serve"))
    killed.set()
    for thread in clients:
        thread.join(WAIT)
    right = wanted(target)
    assert [text for _, text in answers] == [right[number] for number, _ in answers]
    assert tries.count(200) == len(answers) >= QUESTIONS + CLIENTS * AFTER
    wait(lambda: len(replicas() - {gone}) == 2)  # another one has taken its place


def test_the_replicas_serve_all_of_the_application(address: str) -> None:
    page = httpx2.get(f"{address}/", timeout=WAIT)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx2.get(f"{address}/health/ready", timeout=WAIT).json() == {"status": "ready"}
    streamed = {**body(1), "stream": True, "msd": {"trace": True}}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=streamed, timeout=WAIT)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == retried(address, 1, [])
    assert sum(len(event["msd"]["step"]["tokens"]) for event in events if "msd" in event) == TOKENS
    refused = httpx2.post(f"{address}/v1/chat/completions", json={**body(1), "tools": []}, timeout=WAIT)
    assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]
