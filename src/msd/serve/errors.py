"""`HTTPError`: an error with a status and OpenAI's error object. Its text never comes from inside the program."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Problem(BaseModel):
    """What was wrong. type: the kind of error. param: the field that it is about. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: Problem


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HTTPError(Exception):
    """status: of HTTP. message: what was wrong and what to do. param: the field. headers: of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode(errors="replace").decode()  # it may repeat half a character of the request
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
