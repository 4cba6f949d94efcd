"""Sends requests to an OpenAI-compatible server (vLLM, SGLang, …) and retries those that fail on the way."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from msd.errors import UserError
from msd.system.files import parse_json, shortened

BUSY = (408, 429, 500, 502, 503, 504)  # statuses that a later request may not get
LONGEST_PAUSE = 30.0  # seconds between two attempts


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
        begun, pause = time.monotonic(), 0.1
        while True:
            try:
                return self._once(path, body)
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

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        root = self.url.rstrip("/").removesuffix("/v1")
        request = urllib.request.Request(f"{root}/v1/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            raw = answer.read()
        try:
            return parse_json(raw.decode(), finite=False)
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
