"""Reads data lines that hold a chat, as `messages` (OpenAI, AngelSlim) or `conversations` (ShareGPT, LLaVA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msd.errors import UserError, named
from msd.inputs import messages
from msd.inputs.messages import parts

FIELDS = ("messages", "conversations")
SHAREGPT = {"human": "user", "gpt": "assistant"}
PLACEHOLDER = "<image>"  # in LLaVA's texts, where an image of the line stands


def as_turns(line: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a line with a chat as one with `prompt` or `turns`, and `image`; other lines unchanged.

    The chat's assistant messages are left out, as the target answers itself; the one that ends a chat of one question
    is its `answer`. UserError for a chat that data lines cannot express: system or tool messages, images after the
    first question or behind its text, and images without a file name.
    """
    names = [name for name in FIELDS if name in line]
    if not names:
        return line
    if len(names) > 1 or "prompt" in line or "turns" in line:
        raise UserError(f"{where}: '{names[0]}' replaces 'prompt' and 'turns'; give one of them")
    with named(f"{where}: '{names[0]}'"):
        chat, sources = messages.read(_openai(line[names[0]]))
        texts = [_text(message) for message in chat if message["role"] == "user"]
        _check(chat, sources)
        _check_placeholders(line[names[0]], line.get("image"))
    rest = {name: value for name, value in line.items() if name not in FIELDS}
    given = [source for source in sources if source is not None]
    if given:
        rest["image"] = given
    if len(texts) > 1:
        return {**rest, "turns": texts}
    last = chat[-1]
    return {**rest, "prompt": texts[0], "answer": _text(last) if last["role"] == "assistant" else None}


def _openai(chat: Any) -> Any:
    """Returns ShareGPT's messages, `{"from": …, "value": …}`, with a role and content; others unchanged."""
    if not isinstance(chat, list):
        return chat
    found = []
    for message in chat:
        if isinstance(message, Mapping) and "from" in message:
            text = message.get("value")
            text = text.replace(PLACEHOLDER, "").strip() if isinstance(text, str) else text
            message = {"role": SHAREGPT.get(message["from"], message["from"]), "content": text}
        found.append(message)
    return found


def _check(chat: messages.Messages, sources: list[Any]) -> None:
    """Raises UserError for a chat that data lines cannot express."""
    others = [message["role"] for message in chat if message["role"] not in ("user", "assistant")]
    if others:
        raise UserError(f"a message of role '{others[0]}', which data lines do not have; leave the line out")
    questions = [message for message in chat if message["role"] == "user"]
    if not questions:
        raise UserError("no message of role 'user'")
    for number, message in enumerate(questions):
        kinds = [part["type"] for part in parts(message)]
        if any(kind not in ("text", "image") for kind in kinds):
            raise UserError("videos and sounds belong into 'video' of the line")
        if "text" not in kinds:
            raise UserError("a question without text")
        if "image" in kinds and (number or "image" in kinds[kinds.index("text") :]):
            raise UserError("images stand before the text of the first question here; leave the line out")
    if not all(isinstance(source, str | None) and "://" not in (source or "") for source in sources):
        raise UserError("an image without a file name; save it and give its name")


def _check_placeholders(chat: list[Any], image: Any) -> None:
    """Raises UserError unless the images of a line stand in its first question, if ShareGPT's texts name them."""
    counts = [str(message["value"]).count(PLACEHOLDER) for message in chat if "from" in message]
    images = 0 if image is None else len(image) if isinstance(image, list) else 1
    if any(counts) and (sum(counts) != images or any(counts[1:])):
        raise UserError(f"{sum(counts)} {PLACEHOLDER} for {images} 'image', which belong to the first question")


def _text(message: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in parts(message) if part["type"] == "text")
