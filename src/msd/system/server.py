"""Sends requests to an OpenAI-compatible server (vLLM, SGLang, …) and retries those that fail on the way."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from msd.errors import UserError
from msd.system.files import parse_json, read_bytes, shortened

BUSY = (408, 429, 500, 502, 503, 504)  # statuses that a later request may not get
LONGEST_PAUSE = 30.0  # seconds between two attempts
T = TypeVar("T")


class RefusedRequestError(UserError):
    """The server answered that a request is wrong; it would refuse it again."""


@dataclass(frozen=True)
class Server:
    """A server at `url`, with or without a final `/v1`.

    key: sent as a bearer token. patience: seconds for which a failed request is repeated. timeout: seconds that one
    answer may take.
    """

    url: str
    key: str | None = None
    patience: float = 60.0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--server '{shortened(self.url)}' is not a URL such as http://localhost:8000/v1")

    def request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Gets, or with a body posts to, `path` below `/v1`; returns the JSON object of the answer.

        Raises RefusedRequestError for a request that the server refuses, and UserError if it cannot be reached, stays
        busy, or answers with something else.
        """
        return self._patiently(lambda: self._once(path, body))

    def stream(self, path: str, body: dict[str, Any]) -> tuple[list[tuple[float, dict[str, Any]]], float]:
        """Posts to `path` below `/v1`; returns the answer's events with the seconds since it was sent, and all seconds.

        A stream that breaks is asked for again from its beginning. Errors as in `request`.
        """
        return self._patiently(lambda: self._events(path, body))

    def metrics(self) -> str:
        """Returns what the server writes at `/metrics`, or "" if it has no such page."""
        try:
            with self._opened("metrics") as answer:
                return str(answer.read().decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            return ""

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Returns what `attempt` does, and repeats it after failures on the way."""
        begun, pause = time.monotonic(), 0.1
        while True:
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                problem, wait = f"status {error.code}", error.headers.get("Retry-After", "")
                if error.code not in BUSY:
                    text = shortened(error.read(2000).decode("utf-8", "replace"))
                    raise RefusedRequestError(f"the server refused the request: {problem}, {text}") from error
                pause = max(pause, float(wait)) if wait.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if time.monotonic() - begun + pause > self.patience:
                raise UserError(f"the server '{self.url}' does not answer: {problem}; start it again")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _opened(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/').removesuffix('/v1')}/{path}", data, headers)
        return urllib.request.urlopen(request, timeout=self.timeout)

    def _events(self, path: str, body: dict[str, Any]) -> tuple[list[tuple[float, dict[str, Any]]], float]:
        begun, events = time.perf_counter(), list[tuple[float, dict[str, Any]]]()
        with self._opened(f"v1/{path}", body | {"stream": True}) as answer:
            for line in answer:
                name, _, data = line.decode("utf-8", "replace").strip().partition(":")
                if name == "data" and data.strip() == "[DONE]":
                    return events, time.perf_counter() - begun
                if name == "data":
                    events.append((time.perf_counter() - begun, self._parsed(data)))
        raise http.client.HTTPException("the answer broke off")

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._opened(f"v1/{path}", body) as answer:
            raw = answer.read()
        return self._parsed(raw.decode("utf-8", "replace"))

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            return parse_json(text, finite=False)
        except ValueError as error:
            raise UserError(f"the server '{self.url}' answered with no JSON object ({error})") from error

    def model(self, name: str | None) -> str:
        """Returns the name of the served model. UserError if `name` is not served, or is needed to choose one."""
        listed = self.request("models").get("data")
        served = [m["id"] for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)] if listed else []
        if name is None and len(served) == 1:
            return served[0]
        if name is None or name not in served:
            wanted = "give --served-model" if name is None else f"not '{name}'"
            raise UserError(f"the server '{self.url}' serves {', '.join(served) or 'no model'}; {wanted}")
        return name


def data_uri(path: Path) -> str:
    """Returns an image file as a data URI."""
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(read_bytes(path, 'give another image')).decode()}"
