"""Guard: ASGI middleware that every request passes first: API key, size and time of its body, secure headers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from msd.serve.errors import HTTPError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HEALTH = ("/health/live", "/health/ready")
SECURE = [
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"), (b"cache-control", b"no-store"),
]  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """app: what is guarded. keys: accepted API keys; empty: none needed. most: bytes of a body, counted as it arrives.

    seconds: in which a body must have arrived. open: paths that need no key.
    """

    app: App
    keys: tuple[str, ...] = ()
    most: int = 60 * 1000**2
    seconds: float = 30.0
    open: tuple[str, ...] = HEALTH

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", []))
                present = {name for name, _ in own}
                message["headers"] = [*own, *(header for header in SECURE if header[0] not in present)]
            await send(message)

        try:
            headers = dict(scope["headers"])
            if self.keys and scope["path"] not in self.open and not self._known(headers.get(b"authorization", b"")):
                raise HTTPError(401, "give a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
            body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        except HTTPError as failure:
            await refuse(failure, secured)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), secured)

    def _known(self, authorization: bytes) -> bool:
        """Whether the header has one of the keys; compares all of them, each in constant time."""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        equal = [hmac.compare_digest(given, hashlib.sha256(mine.encode()).digest()) for mine in self.keys]
        return scheme.lower() == b"bearer" and any(equal)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Reads the body, within its limits; None if the client has gone."""
        too_large = HTTPError(413, f"the body is larger than {self.most // 1000**2} MB", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.most:
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self.most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError as error:
            raise HTTPError(408, f"the body did not arrive in {self.seconds:.0f} s", code="slow_body") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what follows it."""
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


async def refuse(failure: HTTPError, send: Send) -> None:
    """Answers with the error and closes the connection, whose body may not have been read."""
    more = {"connection": "close", "content-type": "application/json", **(failure.headers or {})}
    headers = [(name.lower().encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(failure.body()).encode()})
