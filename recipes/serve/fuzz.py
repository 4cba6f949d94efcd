"""Sends broken requests to a running `msd serve`, and writes how each kind was answered as JSON.

    python -m recipes.serve.fuzz --count 5000 --out results/serve-fuzz.json

Kinds: mutated images of six formats, mutated JSON, giant or malformed heads, connections closed half-way, bodies that
stop arriving. After every 50 of them, a good request must get the answer that it got before the first one. The exit
status is 1 if there was an answer of 5xx, a connection without an end, or a wrong answer to a good request.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
EVERY = 50  # broken requests between two good ones
PATIENCE = 60.0  # seconds in which a connection must end
STALLED = 0.01  # share of the bodies that stop arriving; each lasts until the server ends it
ODD: tuple[Any, ...] = (None, True, -1, 0, 1e308, 10**30, "", "\x00", "\ud800", [], {}, [[]], {"a": 1}, "x" * 5000)


def chat(model: str, uri: str | None = None, text: str = "What is it?") -> dict[str, Any]:
    """A valid body."""
    image = [] if uri is None else [{"type": "image_url", "image_url": {"url": uri}}]
    content = [*image, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0}


def picture(draw: random.Random, kind: str) -> bytes:
    """An image file of random pixels."""
    size = draw.randint(1, 40), draw.randint(1, 40)
    file = io.BytesIO()
    Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(file, kind)
    return file.getvalue()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Changes, removes, repeats or inserts bytes, more often near the head."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = int(len(changed) * draw.random() ** 2)
        how = draw.randrange(5)
        if how == 0:
            del changed[at:]
        elif how == 1:
            changed[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
        elif how == 2:
            changed[at:at] = changed[at : at + draw.randint(1, 64)]
        elif how == 3:
            changed[at:at] = draw.randbytes(draw.randint(1, 16))
        else:
            changed[at : at + 1] = bytes([draw.randrange(256)])
    return bytes(changed)


def replaced(draw: random.Random, value: Any) -> Any:
    """Replaces, drops or adds a value somewhere in a body."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key} | {draw.choice(("tools", "é", "n")): draw.choice(ODD)}
        return value | {key: replaced(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], replaced(draw, value[at]), *value[at + 1 :] * draw.randint(1, 3)]
    return draw.choice(ODD)


def posted(body: bytes, head: bytes = b"") -> bytes:
    """The bytes of a request."""
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return start + head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class Fuzz:
    """One run. outcomes: of each kind, the number of each status, or how the connection ended."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        address = urllib.parse.urlsplit(url)
        self.url, self.place = url, (address.hostname or "", address.port or 80)
        self.count, self.seed, self.next, self.lock = count, seed, 0, threading.Lock()
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.wrong, self.good, self.slowest = 0, 0, 0.0
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            self.model = json.load(answer)["data"][0]["id"]
        uri = f"data:image/png;base64,{base64.b64encode(picture(random.Random(0), 'PNG')).decode()}"
        self.body = json.dumps(chat(self.model, uri) | {"max_tokens": 8}).encode()
        self.answer = self._good()

    def client(self) -> None:
        """Sends requests until `count` have been sent."""
        while True:
            with self.lock:
                number, self.next = self.next, self.next + 1
            if number >= self.count:
                return
            draw = random.Random(f"{self.seed} {number}")
            kind = draw.choice(("image", "json", "head", "half", "image", "json"))
            kind = "stalled" if draw.random() < STALLED else kind
            send: Callable[[random.Random], str] = getattr(self, f"_{kind}")
            begin = time.monotonic()
            outcome = send(draw)
            with self.lock:
                self.outcomes[kind][outcome] += 1
                self.slowest = max(self.slowest, time.monotonic() - begin)
            if number % EVERY == EVERY - 1:
                right = self._good() == self.answer
                with self.lock:
                    self.good, self.wrong = self.good + 1, self.wrong + (not right)

    def _good(self) -> str:
        """The answer to a good request; waits while the queue is full."""
        head = {"Content-Type": "application/json"}
        while True:
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{self.url}/v1/chat/completions", self.body, head), timeout=PATIENCE
                ) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503):
                    return f"status {error.code}"
                time.sleep(float(error.headers.get("Retry-After", 1)))

    def _exchange(self, data: bytes, close: bool = False) -> str:
        """Sends bytes, then reads until the server closes. Returns the status, "closed" or "no end"."""
        try:
            with socket.create_connection(self.place, timeout=PATIENCE) as connection:
                try:
                    connection.sendall(data)
                    if close:
                        connection.shutdown(socket.SHUT_WR)
                except ConnectionError:  # refused while it was sent; there may be an answer
                    pass
                answer = b""
                while piece := connection.recv(65536):
                    answer += piece
        except TimeoutError:
            return "no end"
        except ConnectionError:
            return "closed"
        return answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP/1.1 ") else "closed"

    def _image(self, draw: random.Random) -> str:
        file = mutated(draw, picture(draw, draw.choice(FORMATS)))
        uri = f"data:image/{draw.choice(FORMATS).lower()};base64,{base64.b64encode(file).decode()}"
        return self._exchange(posted(json.dumps(chat(self.model, uri)).encode()))

    def _json(self, draw: random.Random) -> str:
        body = chat(self.model) | {"n": 1, "stop": ["a"], "seed": 1, "stream": False, "msd": {"method": None}}
        if draw.random() < 0.5:
            return self._exchange(posted(mutated(draw, json.dumps(body).encode())))
        return self._exchange(posted(json.dumps(replaced(draw, body)).encode()))

    def _head(self, draw: random.Random) -> str:
        body, how = json.dumps(chat(self.model)).encode(), draw.randrange(4)
        if how == 0:
            return self._exchange(posted(body, b"X-Long: " + b"a" * draw.randint(40_000, 1_000_000) + b"\r\n"))
        if how == 1:
            return self._exchange(posted(body, b"".join(b"X-%d: y\r\n" % i for i in range(draw.randint(3000, 9000)))))
        if how == 2:
            return self._exchange(posted(body, b"Content-Length: %d\r\n" % draw.choice((0, 1, 10**12, 10**40))))
        return self._exchange(mutated(draw, posted(body)[:120]) + b"\r\n\r\n", close=True)

    def _half(self, draw: random.Random) -> str:
        data = posted(json.dumps(chat(self.model)).encode())
        return self._exchange(data[: draw.randrange(len(data))], close=True)

    def _stalled(self, draw: random.Random) -> str:
        data = posted(json.dumps(chat(self.model)).encode())
        return self._exchange(data[: -draw.randint(1, 20)])


def main() -> None:
    """Runs the clients and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    fuzz, begin = Fuzz(arguments.url, arguments.count, arguments.seed), time.monotonic()
    threads = [threading.Thread(target=fuzz.client) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = {kind: dict(sorted(found.items())) for kind, found in sorted(fuzz.outcomes.items())}
    broken = sum(n for f in fuzz.outcomes.values() for how, n in f.items() if how == "no end" or how[0] == "5")
    result = {
        "requests": arguments.count, "clients": arguments.clients, "seed": arguments.seed,
        "seconds": round(time.monotonic() - begin, 1), "slowest_seconds": round(fuzz.slowest, 1), "outcomes": outcomes,
        "good_requests": fuzz.good, "good_requests_answered_wrongly": fuzz.wrong, "failures": broken,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(broken or fuzz.wrong))


if __name__ == "__main__":
    main()
