"""`msd bench --server`: figures of a small HTTP server that streams, counts as vLLM does, and dies half way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.bench.served import counters, speculation
from training_command import run

PIECES, PAUSE = 3, 0.02
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {tokens}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {second}
vllm:spec_decode_num_drafts_created{{engine="0"}} 1.7e9
"""


class Served(ThreadingHTTPServer):
    """Answers with the target's greedy text, in pieces; 4 steps draft 2 tokens each, and 5 of the 8 are accepted."""

    daemon_threads = True

    def __init__(self, answers: dict[str, dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.bodies, self.done, self.rich = answers, list[dict[str, Any]](), 0, True
        self.deaths: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Served

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        n = self.server.done
        if self.path == "/metrics" and not self.server.rich:
            self.send_error(404)
            return
        text = METRICS.format(drafts=4.0 * n, tokens=8.0 * n, accepted=5.0 * n, first=3.0 * n, second=2.0 * n)
        self.reply(text if self.path == "/metrics" else json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served = self.server
        if "return_token_ids" in body and not served.rich:
            self.send_error(400)
            return
        if served.deaths is not None and served.done >= served.deaths:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.event({"choices": [{"delta": {"content": "cut"}}]}))
            self.close_connection = True
            return
        served.bodies.append(body)
        content = body["messages"][-1]["content"]
        answer = served.answers[content if isinstance(content, str) else content[-1]["text"]]
        text, size = answer["answer"], -(-len(answer["answer"]) // PIECES)
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.event({"choices": [{"delta": {"role": "assistant"}}]}))
        for start in range(0, len(text), size):
            time.sleep(PAUSE)
            self.wfile.write(self.event({"choices": [{"delta": {"content": text[start : start + size]}}]}))
        served.done += 1
        if served.rich:
            self.wfile.write(self.event({"choices": [{"delta": {"content": ""}, "token_ids": answer["ids"]}]}))
        self.wfile.write(self.event({"choices": [], "usage": {"completion_tokens": len(answer["ids"])}}))
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(content)}\n\n".encode()

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with its own greedy answers, which the server gives."""
    return tiny_checkpoint.captured(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(place: Path) -> Iterator[tuple[Served, str]]:
    records = map(json.loads, (place / "captured.jsonl").read_text().splitlines())
    served = Served({record["prompt"]: record for record in records})
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield served, f"http://127.0.0.1:{served.server_address[1]}/v1"
    served.shutdown()
    served.server_close()


def data(place: Path, out: Path) -> Path:
    """Four of the target's prompts, each once."""
    lines = {json.loads(line)["prompt"]: line for line in (place / "captured.jsonl").read_text().splitlines()}
    keep = ("image", "prompt")
    chosen = [{k: v for k, v in json.loads(line).items() if k in keep} for line in list(lines.values())[:4]]
    out.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return out


def test_a_server_is_measured_resumed_and_audited(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, server: tuple[Served, str]
) -> None:
    served, url = server
    out = tmp_path / "out"
    lines = data(place, tmp_path / "data.jsonl")
    ask = ("bench", "--server", url, "--data", lines, "--images", place / "images", "--max-new-tokens", 12, "--json")
    served.deaths = 2
    code, _, err = run(capsys, *ask, "--out", out, "--patience", 0.2)
    assert code == 2 and "broke off" in err and "2 answers are kept" in err and err.count("\n") == 1
    served.deaths = None
    code, told, err = run(capsys, *ask, "--out", out)
    assert code == 0, err
    assert len(served.bodies) == 4, "no answer is asked for twice"
    results = json.loads(told)
    row = results["rows"][0]
    assert json.loads((out / "results.json").read_text()) == results
    assert not (out / "unfinished.jsonl").exists()
    tokens = sum(len(served.answers[json.loads(line)["prompt"]]["ids"]) for line in lines.read_text().splitlines())
    assert (row["method"], row["samples"], row["tokens"]) == ("server:tiny", 4, tokens)
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert PAUSE <= row["first_token_s"] < row["seconds"] / 4, "the first of several pieces"
    assert row["speculative_decoding"] == {
        "mean_acceptance_length": 1 + 5 / 4, "draft_acceptance_rate": 5 / 8,
        "acceptance_histogram": {"0": 4, "1": 4, "2": 8},
        "num_spec_steps": 16, "num_draft_tokens": 32, "num_accepted_draft_tokens": 20, "num_spec_tokens": 2,
    }  # fmt: skip
    audit = ("verify", "--outputs", out / "outputs.jsonl", "--target", place, "--json")
    code, told, err = run(capsys, *audit)
    assert code == 0, err
    assert json.loads(told)["rows"][0]["compared"] == 4
    line = json.loads((out / "outputs.jsonl").read_text().splitlines()[0])
    line["tokens"][1] = 1 + line["tokens"][1] % 40
    (out / "outputs.jsonl").write_text(json.dumps(line) + "\n")
    assert run(capsys, *audit)[0] == 2


def test_turns_are_the_servers_own_and_metrics_are_not_needed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, server: tuple[Served, str]
) -> None:
    served, url = server
    served.rich = False
    served.answers = {"One?": {"answer": "first", "ids": [1, 2]}, "Two?": {"answer": "second", "ids": [3]}}
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"turns": ["One?", "Two?"], "category": "chat"}\n')
    code, told, err = run(capsys, "bench", "--server", url, "--data", lines, "--json")
    assert code == 0, err
    row = json.loads(told)["rows"][0]
    assert row["tokens"] == 3 and row["mean_acceptance_length"] is None and row["speculative_decoding"] is None
    assert [m["content"] for m in served.bodies[-1]["messages"]] == ["One?", "first", "Two?"]


@pytest.mark.parametrize("option", [("--method", "ar"), ("--batch", "2"), ("--target", "x"), ("--epsilon", "0.1")])
def test_options_of_our_engine_are_refused(capsys: pytest.CaptureFixture[str], option: tuple[str, str]) -> None:
    code, _, err = run(capsys, "bench", "--server", "http://127.0.0.1:1", *option)
    assert code == 2 and f"'{option[0][2:]}' is no option of --server" in err


def test_counters_of_several_engines_are_summed() -> None:
    text = METRICS.format(drafts=1.0, tokens=2.0, accepted=1.0, first=1.0, second=0.0)
    assert counters(text + text)["drafts"] == 2.0
    assert speculation({}) is None
