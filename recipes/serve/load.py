"""Sends chats of many clients to a running `msd serve`, and writes throughput, latencies, errors and memory as JSON.

    python -m recipes.serve.load --data ../shared/data --pid PID --out results/serve-msd.json
    python -m recipes.serve.load --data ../shared/data --transformers --limit 24 --out results/serve-transformers.json
    python -m recipes.serve.load --data ../shared/data --against http://127.0.0.1:8001 --seconds 60 --out FILE

Half of the requests describe one of 24 photos in 96 tokens, half are text. A client sends its next request when it has
the answer; after a 429 it waits as long as the server says. All answers are greedy, so they can be compared by run.
The first `--warm-up` seconds are not counted: until then batch and caches grow. With `--against`, two servers have the
load in turn, `--rounds` times; the one without it is idle.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from msd.system import machine
from recipes.reference_vlm.data import DETAIL_PROMPTS

PHOTOS, TOKENS = 24, 96
TEXTS = (
    "Why is the sky blue?", "Write a short story about a lighthouse.", "How do I boil an egg?",
    "List five animals that live in the sea.", "What is a prime number?", "Explain how a bicycle works.",
)  # fmt: skip


def requests(folder: Path) -> list[tuple[Path | None, str]]:
    """(photo or None, prompt) of the requests; clients go through them in this order, again and again."""
    photos = sorted((folder / "coco_vqa" / "images").glob("*.jpg"))[:PHOTOS]
    if len(photos) < PHOTOS:
        raise SystemExit(f"{folder} has {len(photos)} photos; {PHOTOS} are needed")
    found: list[tuple[Path | None, str]] = []
    for i, photo in enumerate(photos):
        found += [(photo, DETAIL_PROMPTS[i % len(DETAIL_PROMPTS)]), (None, TEXTS[i % len(TEXTS)])]
    return found


class Load:
    """The clients of one run. records: of each answer (when it ended, seconds to the first token and to the end)."""

    def __init__(self, url: str, asked: list[tuple[Path | None, str]], seconds: float, warm_up: float) -> None:
        self.url, self.asked, self.begin = url, asked, time.monotonic() + warm_up
        self.until = self.begin + seconds
        self.next, self.lock = count(), threading.Lock()
        self.records: list[tuple[float, float, float, int]] = []
        self.texts: dict[int, set[str]] = {}
        self.errors: Counter[str] = Counter()
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            self.model = json.load(answer)["data"][0]["id"]

    def client(self) -> None:
        """Sends requests until the time is over."""
        while time.monotonic() < self.until:
            number = next(self.next) % len(self.asked)
            try:
                self._ask(number)
            except urllib.error.HTTPError as error:
                self.errors[str(error.code)] += 1
                time.sleep(float(error.headers.get("Retry-After", 1)) if error.code == 429 else 1.0)
            except OSError as error:
                self.errors[type(error).__name__] += 1

    def _ask(self, number: int) -> None:
        photo, prompt = self.asked[number]
        parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if photo is not None:
            uri = f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"
            parts.insert(0, {"type": "image_url", "image_url": {"url": uri}})
        body = {
            "model": self.model, "messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), head)
        begin, first, text, tokens, ended = time.monotonic(), 0.0, "", 0, False
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                if line.strip() == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        break
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    piece = "".join(c["delta"].get("content", "") for c in chunk["choices"])
                    first, text = first or (time.monotonic() - begin if piece else 0.0), text + piece
        now = time.monotonic()
        with self.lock:
            if not ended:
                self.errors["broken answer"] += 1
                return
            if now >= self.begin:
                self.records.append((now, first, now - begin, tokens))
            self.texts.setdefault(number, set()).add(hashlib.sha256(text.encode()).hexdigest()[:16])


def loaded(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    """Runs the clients, and reads the server's memory meanwhile."""
    load = Load(url, requests(arguments.data), arguments.seconds, arguments.warm_up)
    clients = [threading.Thread(target=load.client) for _ in range(arguments.clients)]
    for client in clients:
        client.start()
    memory: list[float] = []
    while any(client.is_alive() for client in clients):
        if arguments.pid and load.begin <= time.monotonic() < load.until:
            memory.append(psutil.Process(arguments.pid).memory_info().rss / 1e6)
        time.sleep(1.0)
    seconds = max(r[0] for r in load.records) - load.begin if load.records else 0.0
    tokens = sum(r[3] for r in load.records)
    halves = [float(np.mean(half)) for half in np.array_split(memory, 2)] if len(memory) > 1 else []
    return {
        "cpu": machine.processor(), "clients": arguments.clients, "warm_up": arguments.warm_up,
        "seconds": seconds, "answers": len(load.records), "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0, "errors": dict(load.errors),
        "first_token_seconds": _percentiles([r[1] for r in load.records]),
        "total_seconds": _percentiles([r[2] for r in load.records]),
        "rss_mb_by_half": halves, "rss_mb_every_20_s": memory[::20],
        "requests_with_different_answers": sum(len(texts) > 1 for texts in load.texts.values()),
        "answers_sha256": {str(number): sorted(texts) for number, texts in sorted(load.texts.items())},
    }  # fmt: skip


def in_turn(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads two servers in turn; "ratio": tokens per second of the first over those of the second, in all rounds."""
    urls, rounds = [arguments.url, arguments.against], []
    for number in range(arguments.rounds):
        found = {url: loaded(arguments, url) for url in urls[:: -1 if number % 2 else 1]}
        rounds.append([{k: found[url][k] for k in ("seconds", "answers", "tokens", "errors")} for url in urls])
        print(*(f"{found[url]['tokens_per_second']:.1f}" for url in urls), "tokens/s", flush=True)
    speeds = [sum(r[i]["tokens"] for r in rounds) / sum(r[i]["seconds"] for r in rounds) for i in (0, 1)]
    return {
        "cpu": machine.processor(), "clients": arguments.clients, "warm_up": arguments.warm_up, "servers": urls,
        "tokens_per_second": speeds, "ratio": speeds[0] / speeds[1], "rounds": rounds,
    }  # fmt: skip


def one_after_another(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers the first requests with `transformers` alone."""
    import torch

    from msd.inputs import prompts
    from msd.loading import load_target

    model, processor = load_target("reference")
    begin, tokens, texts = time.monotonic(), 0, {}
    for number, (photo, prompt) in enumerate(requests(arguments.data)[: arguments.limit]):
        inputs = prompts.prepare(processor, [[] if photo is None else [str(photo)]], [prompt])
        with torch.inference_mode():
            new = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        tokens += len(new)
        text = processor.tokenizer.decode(new, skip_special_tokens=True)
        texts[str(number)] = [hashlib.sha256(text.encode()).hexdigest()[:16]]
    seconds = time.monotonic() - begin
    return {
        "cpu": machine.processor(), "answers": arguments.limit, "seconds": seconds,
        "tokens": tokens, "tokens_per_second": tokens / seconds,
        "answers_sha256": texts,
    }  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 99)} if values else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_vqa/images")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="of the server, to read its memory")
    parser.add_argument("--against", help="another server, which has the same load in turn")
    parser.add_argument("--rounds", type=int, default=4, help="with --against")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds before those that count")
    parser.add_argument("--transformers", action="store_true", help="no server: one after another, with transformers")
    parser.add_argument("--limit", type=int, default=24, help="requests with --transformers")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.against:
        result = in_turn(arguments)
    else:
        result = one_after_another(arguments) if arguments.transformers else loaded(arguments, arguments.url)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "answers_sha256"}, indent=1))


if __name__ == "__main__":
    main()
