"""Lets an OpenAI-compatible server write the answers for `msd.train.capture.keep`, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from msd.errors import UserError, named
from msd.system.files import named_in
from msd.system.server import RefusedRequestError, Server, data_uri
from msd.train.capture import Answer, Decoding, Key, Prompt


class ServerWriter:
    """Asks a server for answers; `concurrency` requests are under way at a time.

    Answers come without gains, which need the target itself (`msd.train.given_answers`). vLLM gives their token ids;
    from other servers `ids` is empty. folder: image names are relative to it. places: where each prompt stands, for
    messages.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        folder: Path,
        max_new_tokens: int,
        concurrency: int,
        places: Mapping[Key, str] | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.server, self.model, self.folder = server, model, folder
        self.max_new_tokens, self.concurrency, self.places = max_new_tokens, concurrency, places or {}
        self.decoding = decoding or Decoding()
        self._gives_ids = True  # until the server refuses to

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[Prompt, Answer]]]:
        """Yields each answer as it arrives. A failure stops further requests; those under way are still yielded."""
        failure: UserError | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            running = {pool.submit(self.ask, prompt): prompt for prompt in prompts}
            try:
                for future in as_completed(running):
                    if future.cancelled():
                        continue
                    try:
                        answer = future.result()
                    except UserError as error:
                        failure = failure or error
                        for waiting in running:  # not the pool's own way, which `as_completed` would wait for
                            waiting.cancel()
                        continue
                    yield [(running[future], answer)]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def ask(self, prompt: Prompt) -> Answer:
        """Returns the server's answer. UserError, with the place of the prompt, if there is none."""
        with named(self.places.get(prompt.key, repr(prompt.text[:60]))):
            body = {
                "model": self.model, "messages": [{"role": "user", "content": self._content(prompt)}],
                "temperature": self.decoding.temperature, "max_tokens": self.max_new_tokens,
            }  # fmt: skip
            if self.decoding.sampled:
                body["seed"] = self.decoding.seed_of(prompt)
            with_ids = self._gives_ids
            try:
                reply = self.server.request("chat/completions", body | ({"return_token_ids": True} if with_ids else {}))
            except RefusedRequestError:
                if not with_ids:
                    raise
                reply = self.server.request("chat/completions", body)
                self._gives_ids = False
            return _answer(reply)

    def _content(self, prompt: Prompt) -> str | list[dict[str, Any]]:
        """Returns the message's content: the images, as data URIs, and the text."""
        if not prompt.images:
            return prompt.text
        urls = [data_uri(named_in(self.folder, name)) for name in prompt.images]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [*parts, {"type": "text", "text": prompt.text}]


def _answer(reply: dict[str, Any]) -> Answer:
    """Reads a chat completion. UserError for anything else."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise UserError("the server's answer holds no text")
    ids = choice.get("token_ids") or ()
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError("the server's answer holds token ids that are not numbers")
    return Answer(text, tuple(ids), choice.get("finish_reason") == "stop")
