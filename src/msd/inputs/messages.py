"""Validates chat messages, brings them into one form, and extracts the media that they contain.

A media part of a message has a source or is a placeholder for media that are given separately; in one chat either all
media parts have a source or none. Accepted forms are the library's (`{"type": "image", "path" | "url" | "image" |
"base64": …}`, also for video and audio) and OpenAI's (`image_url`, `video_url`, `audio_url`, `input_audio`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from msd.errors import UserError
from msd.inputs.media import Audio, Clip, Video

Messages = list[dict[str, Any]]
KINDS = ("image", "video", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool")
OPENAI = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
SOURCES = ("path", "url", "base64")  # keys of a source, besides the part's own kind
INNER_SOURCES = ("url", "path", "bytes", "base64", "data")  # keys of a source that is itself an object
# keys without influence on pixels and samples
IGNORED = ("type", "detail", "cache_control", "id", "uuid", "name", "format")


def read(chat: Any) -> tuple[Messages, list[Any]]:
    """Returns (messages with text or lists of text and placeholder parts, the sources of the media parts in order).

    The sources are empty if no part has one. UserError for anything but a valid chat; it names the message.
    """
    if not isinstance(chat, list | tuple) or not chat:
        raise UserError(
            f"messages must be a list of at least one message, got {_described(chat)}; "
            "such as [{'role': 'user', 'content': 'What is it?'}]"
        )
    messages: Messages = []
    sources: list[Any] = []  # per media part, None for a placeholder
    for number, message in enumerate(chat, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {_described(message)}, not an object with 'role' and 'content'")
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {_described(message.get('role'))}; give one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list | tuple) and content:
            parsed = [_part(part, f"part {i} of {where}") for i, part in enumerate(content, 1)]
            sources += [source for part, source in parsed if part["type"] != "text"]
            content = [part for part, _ in parsed]
        elif not isinstance(content, str):
            raise UserError(f"{where} has the content {_described(content)}; give text, or a list of at least one part")
        messages.append({**message, "content": content})
        empty = all(part["type"] == "text" and not part["text"].strip() for part in parts(messages[-1]))
        if message["role"] == "user" and empty:
            raise UserError(f"{where} is empty; ask something, for example 'Describe the image.'")
    carried = [source for source in sources if source is not None]
    if carried and len(carried) < len(sources):
        raise UserError(
            f"{len(carried)} of the {len(sources)} media parts in the messages have a source; "
            "give all of them a source, or none and pass the media separately"
        )
    return messages, carried


def parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: Mapping[str, Any]) -> str:
    """Returns all text that a template may render of a message, without separators between its parts."""
    text = "".join(part.get("text", "") for part in parts(message))
    return text + "".join(str(value) for name, value in message.items() if name != "content")


def _part(part: Any, where: str) -> tuple[dict[str, Any], Any]:
    """Returns (a text part or a placeholder part, its source or None)."""
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {_described(part)}, not an object with a 'type'")
    name = part.get("type")
    if name == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has the text {_described(part.get('text'))}; give text")
        return {"type": "text", "text": part["text"]}, None
    kind = OPENAI.get(name, name) if isinstance(name, str) else None
    if kind not in KINDS:
        raise UserError(f"{where} has the type {_described(name)}; give one of text, {', '.join((*KINDS, *OPENAI))}")
    keys = (name,) if name in OPENAI else (kind, *SOURCES)
    for key, value in part.items():
        if key not in (*keys, *IGNORED) and value is not None:
            raise UserError(f"{where} has '{key}', which is not supported; leave it out")
    found = [(key, part[key]) for key in keys if part.get(key) is not None]
    if len(found) > 1 or (name in OPENAI and not found):
        raise UserError(f"{where} carries {len(found)} {kind}s; give one, by one of the keys {', '.join(keys)}")
    return {"type": kind}, _source(kind, *found[0], where) if found else None


def _source(kind: str, key: str, value: Any, where: str) -> Any:
    """Returns the source of a media part, as `prompts.load` accepts it."""
    if isinstance(value, Mapping):
        inner = [(name, value[name]) for name in INNER_SOURCES if value.get(name) is not None]
        if not inner:
            raise UserError(f"{where} carries an object without any of {', '.join(INNER_SOURCES)}")
        key, value = inner[0]
    if key in ("base64", "data") and isinstance(value, str) and not value.startswith("data:"):
        value = f"data:;base64,{value}"
    if kind == "image" or isinstance(value, Video | Clip if kind == "video" else Audio):
        return value
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{where} carries {_described(value)}; give the path of the {kind}")
    return Video(value) if kind == "video" else Audio(value)


def _described(value: Any) -> str:
    """Describes a wrong value for a message: text and None themselves, anything else by its type."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"'{value[:40]}'"
    empty = isinstance(value, list | tuple | dict) and not value
    return f"an empty {type(value).__name__}" if empty else f"of type {type(value).__name__}"
