"""`msd capture --server`: answers of an OpenAI-compatible server, many at once, also of one that dies half way."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.errors import UserError
from msd.system.server import Server
from msd.train.capture import read_captured
from training_command import run


class Served(ThreadingHTTPServer):
    """Answers from `answers` by (images, text). seen: the keys asked for. decoding: temperature and
    seed of each. deaths: requests until it drops all."""

    daemon_threads = True

    def __init__(self, answers: dict[tuple[int, str], dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen = answers, list[tuple[int, str]]()
        self.decoding: list[tuple[float, int | None]] = []
        self.deaths: int | None = None
        self.strict = self.busy_once = False
        self.running = self.most = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Served

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served = self.server
        with served.lock:
            served.running += 1
            served.most = max(served.most, served.running)
        time.sleep(0.02)
        with served.lock:
            served.running -= 1
            dead = served.deaths is not None and len(served.seen) >= served.deaths
            busy, served.busy_once = served.busy_once, False
        if dead:
            self.close_connection = True
            self.connection.close()
            return
        if busy:
            self.reply(503, {"error": "loading"})
            return
        if served.strict and "return_token_ids" in body:
            self.reply(400, {"error": "unknown field return_token_ids"})
            return
        assert body["model"] == "tiny"
        content = body["messages"][0]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        pixels = [base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in parts if p["type"] == "image_url"]
        assert all(p.startswith(b"\x89PNG") for p in pixels)
        key = (hash(tuple(pixels)), parts[-1]["text"])
        with served.lock:
            served.seen.append(key)
            served.decoding.append((body["temperature"], body.get("seed")))
        record = served.answers[key]
        choice: dict[str, Any] = {"message": {"content": record["answer"]}, "finish_reason": "length"}
        if not served.strict:
            choice["token_ids"] = record["ids"]
        self.reply(200, {"choices": [choice]})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with its own captured answers, which the server gives."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("served"))


@contextmanager
def serving(place: Path) -> Iterator[tuple[Served, str]]:
    """(the server, its URL)."""
    answers = {}
    for line in (place / "captured.jsonl").read_text().splitlines():
        record = json.loads(line)
        answers[hash(tuple((place / "images" / n).read_bytes() for n in record["image"])), record["prompt"]] = record
    server = Served(answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def arguments(place: Path, out: Path, *more: object) -> list[object]:
    data = ["--data", place / "data.jsonl", "--images", place / "images"]
    return ["capture", *data, "--out", out, "--max-new-tokens", 12, "--json", *more]


def records(path: Path) -> dict[Any, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len({(*r["image"], r["prompt"]) for r in found})
    return {(*r["image"], r["prompt"]): r for r in found}


def test_a_server_that_dies_loses_nothing_and_its_answers_are_labelled(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "served.jsonl"
    with serving(place) as (server, url):
        ask = arguments(place, out, "--server", url, "--concurrency", 4, "--patience", 0.3)
        server.deaths = 5
        code, _, err = run(capsys, *ask)
        kept = records(out)
        assert code == 2 and "does not answer" in err and "the same command resumes" in err.splitlines()[-1]
        assert 5 <= len(kept) == len(server.seen) < 13
        server.deaths, server.busy_once = None, True
        code, told, err = run(capsys, *ask)
        assert code == 0, err
        summary = json.loads(told)
        assert (summary["records"], summary["written"], summary["with_ids"]) == (13, 13 - len(kept), 13)
        assert len(server.seen) == 13 == len(set(server.seen)), "no prompt is answered twice"
        assert 1 < server.most <= 4 and set(server.decoding) == {(0, None)}
        assert all(r["served_model"] == "tiny" and "gain" not in r for r in records(out).values())
    # labelled by the target, the answers are those that it captures itself
    labelled = tmp_path / "labelled.jsonl"
    code, told, err = run(capsys, *arguments(place, labelled, "--answers", out, "--target", place))
    assert code == 0, err
    assert json.loads(told)["greedy"] == 1.0
    own, mine = records(place / "captured.jsonl"), records(labelled)
    assert own.keys() == mine.keys()
    for key, record in own.items():
        assert mine[key]["gain"] == pytest.approx(record["gain"], abs=2e-4)
        assert {k: v for k, v in mine[key].items() if k != "gain"} == {k: v for k, v in record.items() if k != "gain"}
    assert len(read_captured(labelled, place / "images")) == 13


def test_shards_share_the_prompts_and_servers_may_give_no_ids(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "served.jsonl"
    with serving(place) as (server, url):
        server.strict = True
        for shard in ("1/2", "2/2"):
            code, told, err = run(capsys, *arguments(place, out, "--server", f"{url}/v1/", "--shard", shard))
            assert code == 0, err
            assert json.loads(told)["with_ids"] == 0
    parts = [records(tmp_path / f"served-{i}-of-2.jsonl") for i in (1, 2)]
    assert not parts[0].keys() & parts[1].keys()
    assert (parts[0] | parts[1]).keys() == records(place / "captured.jsonl").keys()
    code, _, err = run(capsys, *arguments(place, out, "--answers", tmp_path / "served-1-of-2.jsonl", "--target", place))
    assert code == 2 and "no answer is given" in err and "data.jsonl:" in err
    both = [option for i in (1, 2) for option in ("--answers", tmp_path / f"served-{i}-of-2.jsonl")]
    code, _, err = run(capsys, *arguments(place, tmp_path / "labelled.jsonl", *both, "--target", place))
    assert code == 0, err
    own, mine = records(place / "captured.jsonl"), records(tmp_path / "labelled.jsonl")
    assert own.keys() == mine.keys()
    for key, record in mine.items():  # their text as tokens; random bytes are not all text
        assert 0 < len(record["ids"]) == len(record["gain"]) <= 12
        assert record["ids"] == own[key]["ids"] or "\ufffd" in record["answer"]


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"
    for options, message in (
        (("--shard", "1/2"), "--shard is for --server"),
        (("--server", url, "--target", place), "--server answers by itself"),
        (("--server", url, "--shard", "3/2"), "is not I/N"),
        (("--server", "localhost", "--patience", 0), "is not a URL"),
        (("--server", url, "--patience", 0), "does not answer"),
        (("--answers", tmp_path / "none.jsonl"), "there is no file"),
    ):
        code, out, err = run(capsys, *arguments(place, tmp_path / "out.jsonl", *options))
        assert (code, out) == (2, "") and message in err.splitlines()[-1], options


def test_a_model_that_is_not_served_is_named(place: Path) -> None:
    with serving(place) as (_, url):
        assert Server(url).model(None) == "tiny"
        with pytest.raises(UserError, match="serves tiny; not 'large'"):
            Server(url).model("large")


def test_sampled_answers_have_a_seed_each(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "sampled.jsonl"
    with serving(place) as (server, url):
        assert run(capsys, *arguments(place, out, "--server", url, "--temperature", 0.5, "--seed", 7))[0] == 0
        assert {temperature for temperature, _ in server.decoding} == {0.5}
        assert len({seed for _, seed in server.decoding}) == len(server.decoding) == 13
    assert {(r["temperature"], r["seed"]) for r in records(out).values()} == {(0.5, 7)}
