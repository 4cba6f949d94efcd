"""`msd serve --ray` in a cluster of two local nodes: a replica that dies under load loses no retried request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")
import httpx2
import ray

import tiny_checkpoint
from serve.cluster import QUESTIONS, TOKENS, WAIT, Load, body, replicas, retried, serving, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]
AFTER = 4  # questions of each client after a replica has been killed


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def address(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas, one on each node."""
    with serving(target, [1, 1], tmp_path_factory.mktemp("ray"), "--replicas", "2", "--max-replicas", "3") as address:
        yield address


def test_a_replica_killed_under_load_loses_no_request(address: str, target: Path) -> None:
    before = replicas()
    assert len(before) == 2
    load = Load(address, AFTER)
    wait(lambda: len(load.answers) >= QUESTIONS)
    gone = min(before)
    ray.kill(ray.get_actor(gone, namespace="serve"))
    load.end(target)
    wait(lambda: len(replicas() - {gone}) == 2)  # another one has taken its place


def test_the_replicas_serve_all_of_the_application(address: str) -> None:
    page = httpx2.get(f"{address}/", timeout=WAIT)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx2.get(f"{address}/health/ready", timeout=WAIT).json() == {"status": "ready"}
    question = body(1)
    streamed = {**question, "stream": True, "msd": {"trace": True}}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=streamed, timeout=WAIT)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == retried(address, question, [])
    assert sum(len(event["msd"]["step"]["tokens"]) for event in events if "msd" in event) == TOKENS
    refused = httpx2.post(f"{address}/v1/chat/completions", json={**question, "tools": []}, timeout=WAIT)
    assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]
