"""Chat messages as users write them: checked, brought into one form, and what they carry taken out of them.

Read are the library's parts (`{"type": "image", "path" | "url" | "image" | "base64": …}`, and so for video and audio)
and OpenAI's (`image_url`, `video_url`, `audio_url`, `input_audio`). A part without any of these marks a place for what
is given beside the messages. Either all places of a chat carry their own or none does.
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
SOURCES = ("path", "url", "base64")  # and the part's own kind
INSIDE = ("url", "path", "bytes", "base64", "data")  # of a source that is an object itself
HARMLESS = (
    "type",
    "detail",
    "cache_control",
    "id",
    "uuid",
    "name",
    "format",
)  # keys that change no pixel and no sample


def read(chat: Any) -> tuple[Messages, list[Any]]:
    """(messages whose contents are text, or parts that are text or mark a place; what the places carry, in order).

    The second is empty where nothing is carried. UserError for what is no chat, saying which message is wrong.
    """
    if not isinstance(chat, list | tuple) or not chat:
        raise UserError(
            f"messages must be a list of at least one message, got {_told(chat)}; "
            "such as [{'role': 'user', 'content': 'What is it?'}]"
        )
    written: Messages = []
    places: list[Any] = []  # what each carries, or None
    for number, message in enumerate(chat, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {_told(message)}, not an object with 'role' and 'content'")
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {_told(message.get('role'))}; give one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list | tuple) and content:
            parts = [_part(part, f"part {i} of {where}") for i, part in enumerate(content, 1)]
            places += [carried for part, carried in parts if part["type"] != "text"]
            content = [part for part, _ in parts]
        elif not isinstance(content, str):
            raise UserError(f"{where} has the content {_told(content)}; give text, or a list of at least one part")
        written.append({**message, "content": content})
        if message["role"] == "user" and not _says_something(content):
            raise UserError(f"{where} is empty; say what you want to know, for example 'Describe the image.'")
    carried = [source for source in places if source is not None]
    if carried and len(carried) < len(places):
        raise UserError(
            f"{len(carried)} of the {len(places)} places in the messages carry what they show; "
            "let all of them carry it, or none and give it beside the messages"
        )
    return written, carried


def text_of(message: Mapping[str, Any]) -> str:
    """All that a message of `read` says, as a template may write it: its parts without anything between them."""
    content = message["content"]
    said = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return said + "".join(str(value) for name, value in message.items() if name != "content")


def _says_something(content: str | list[dict[str, Any]]) -> bool:
    """Whether a content has a word in it, or a place of something shown."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return any(part["type"] != "text" or part["text"].strip() for part in parts)


def _part(part: Any, where: str) -> tuple[dict[str, Any], Any]:
    """(the part as text or as the mark of a place, what the place carries or None)."""
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {_told(part)}, not an object with a 'type'")
    given = part.get("type")
    if given == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has the text {_told(part.get('text'))}; give text")
        return {"type": "text", "text": part["text"]}, None
    kind = OPENAI.get(given, given) if isinstance(given, str) else None
    if kind not in KINDS:
        raise UserError(f"{where} has the type {_told(given)}; give one of text, {', '.join((*KINDS, *OPENAI))}")
    keys = (given,) if given in OPENAI else (kind, *SOURCES)
    for key, value in part.items():
        if key not in (*keys, *HARMLESS) and value is not None:
            raise UserError(f"{where} has '{key}', which is not supported; leave it out")
    found = [(key, part[key]) for key in keys if part.get(key) is not None]
    if len(found) > 1 or (given in OPENAI and not found):
        raise UserError(f"{where} carries {len(found)} {kind}s; give one, by one of the keys {', '.join(keys)}")
    return {"type": kind}, _source(kind, *found[0], where) if found else None


def _source(kind: str, key: str, value: Any, where: str) -> Any:
    """What a part carries, as `prompts.load` takes it."""
    if isinstance(value, Mapping):
        inner = [(name, value[name]) for name in INSIDE if value.get(name) is not None]
        if not inner:
            raise UserError(f"{where} carries an object without any of {', '.join(INSIDE)}")
        key, value = inner[0]
    if key in ("base64", "data") and isinstance(value, str) and not value.startswith("data:"):
        value = f"data:;base64,{value}"
    if kind == "image" or isinstance(value, Video | Clip if kind == "video" else Audio):
        return value
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{where} carries {_told(value)}; give the path of the {kind}")
    return Video(value) if kind == "video" else Audio(value)


def _told(value: Any) -> str:
    """A wrong value in a message: text and nothing as they are, of all else the type."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"'{value[:40]}'"
    empty = isinstance(value, list | tuple | dict) and not value
    return f"an empty {type(value).__name__}" if empty else f"of type {type(value).__name__}"
