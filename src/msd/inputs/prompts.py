"""Turns prompts or chats with images, videos and sounds into processor output.

User text that contains an image placeholder is refused, since the processor would expand it (CVE-2026-44222). Text that
contains a turn marker, such as `<|im_end|>`, is tokenized as that marker, as in `transformers`: a program whose prompts
come from others must remove these markers first.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from msd.errors import UserError
from msd.inputs import messages
from msd.inputs.images import load_image
from msd.inputs.media import Audio, Clip, Video
from msd.inputs.messages import KINDS, Messages
from msd.system.files import shortened

# occurs in media placeholders and the markers around them, and in their names
MEDIA = re.compile(r"image|img|vision|video|audio|sound|frame|row_\d|\b[be]oi", re.IGNORECASE)
MOST_SCALED = 400 * 1000 * 1000  # pixels of an image after scaling and before cropping


def prepare(
    processor: Any,
    media: Sequence[Sequence[Any]],
    prompts: Sequence[str] | None = None,
    chats: Sequence[Messages] | None = None,
) -> dict[str, Any]:
    """Prepares a batch of requests.

    If the model supports images but no videos, the frames of a video become images.

    Args:
        processor: of the model.
        media: one list per request, in reading order: images (paths, bytes, PIL images, arrays), `Video`s or `Clip`s,
            `Audio`s.
        prompts: one text per request.
        chats: instead of prompts, one message list per request. Its media parts are placeholders for `media`, or
            contain the media themselves (see `msd.inputs.messages`).

    Returns:
        input_ids [B, L] (left-padded), attention_mask [B, L], and the tensors of the media.

    Raises:
        UserError: an invalid chat, reserved text, unreadable media, or media that the model does not support.
    """
    return Request.of(processor, media, prompts, chats).inputs()


@dataclass(frozen=True)
class Request:
    """What the prompts of a batch ask, before a processor turns it into tensors.

    processor: of the model that is asked. media: the loaded images, videos and sounds of each prompt, in reading order.
    chats: the messages of each prompt, whose media parts are placeholders. A drafter that reads prompts itself, with
    its own processor, finds the request in `State.request`.
    """

    processor: Any
    media: list[list[Any]]
    chats: list[Messages]

    @classmethod
    def of(
        cls,
        processor: Any,
        media: Sequence[Sequence[Any]],
        prompts: Sequence[str] | None = None,
        chats: Sequence[Messages] | None = None,
    ) -> Request:
        """Checks and loads a request. Arguments and errors: see `prepare`."""
        if chats is None:
            chats = [_chat(prompt, group) for prompt, group in zip(prompts or (), media, strict=True)]
        requests = [_request(chat, group) for chat, group in zip(chats, media, strict=True)]
        reserved = placeholders(processor)
        for chat, group in requests:
            _check(reserved, chat, [kind(source) for source in group])
        return cls(processor, [group for _, group in requests], [chat for chat, _ in requests])

    def inputs(self) -> dict[str, Any]:
        """Returns the processor's output. UserError for media that the model does not support."""
        processor = self.processor
        supported = _supported(processor, {kind(source) for group in self.media for source in group})
        pairs = zip(self.chats, self.media, strict=True)
        requests = [_with_supported_media(supported, chat, group) for chat, group in pairs]
        texts = [_render(processor, chat) for chat, _ in requests]
        processor.tokenizer.padding_side = "left"
        bos = processor.tokenizer.bos_token
        special = not (bos and all(text.startswith(bos) for text in texts))  # no second BOS token after the template's
        groups = [group for _, group in requests]
        arguments = _media_arguments(processor, groups)
        try:
            batch = processor(
                text=texts, padding=len(texts) > 1, return_tensors="pt", add_special_tokens=special, **arguments
            )
        except ValueError as error:
            what = "does not accept these media" if any(groups) else "accepts no prompt without an image"  # PaliGemma
            raise UserError(f"this model's processor {what} ({error})") from error
        return {name: tensor for name, tensor in batch.items() if name != "labels"}  # PaliGemma's, for training

    def described(self, texts: Sequence[Sequence[str]] | None = None) -> Request:
        """Returns the request without media. texts: for each medium, the text that replaces it; else it is left out."""
        chats: list[Messages] = []
        for row, chat in enumerate(self.chats):
            words = iter(()) if texts is None else iter(texts[row])
            chats.append([{**message, "content": _described(messages.parts(message), words)} for message in chat])
        return replace(self, media=[[] for _ in chats], chats=chats)


def _described(parts: list[dict[str, Any]], words: Iterator[str]) -> list[dict[str, Any]]:
    """Replaces each media part by a text part with the next of `words`; drops it if there are none left."""
    texts = [part["text"] if part["type"] == "text" else next(words, "") for part in parts]
    return [{"type": "text", "text": text} for text in texts if text]


def grouped(images: Any, count: int) -> list[list[Any]]:
    """Returns the media of each of `count` prompts. images: one source for all, or a list with one entry per prompt."""
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple):
        return [[load(images)]] * count
    if images and len(images) != count:
        raise UserError(
            f"{count} prompts but {len(images)} entries of images; give a source or a list of sources for each "
            "prompt, or one source for all"
        )
    listed = images or [None] * count
    return [list(g) if isinstance(g, list | tuple) else [] if g is None else [g] for g in listed]


def load(source: Any) -> Any:
    """Loads an image, or the frames of a video. Sounds are decoded later, at the model's sampling rate."""
    if isinstance(source, Clip | Audio):
        return source
    return source.load() if isinstance(source, Video) else load_image(source)


def kind(source: Any) -> str:
    """Returns "image", "video" or "audio"."""
    return "video" if isinstance(source, Video | Clip) else "audio" if isinstance(source, Audio) else "image"


def check_text(prompt: str) -> None:
    """Raises UserError for a prompt that is no text, is empty, or contains unpaired surrogates."""
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise UserError("the prompt is empty; ask something, for example 'Describe the image.'")
    _check_characters(prompt, "the prompt")


def placeholders(processor: Any) -> list[str]:
    """Returns the tokens that a processor reserves for media: placeholders, and the tokens it expands them to."""
    tokenizer = processor.tokenizer
    named = {**vars(processor), **getattr(tokenizer, "special_tokens_map", {})}
    named |= {f"{name}_token": getattr(processor, f"{name}_token", None) for name in KINDS}
    reserved = {str(t) for name, t in named.items() if re.search(r"_(token|tag)$", name) and MEDIA.search(name)}
    added = (t for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False))
    reserved |= {text for text in (getattr(token, "content", "") for token in added) if MEDIA.search(text)}
    return sorted(token for token in reserved if token != "None" and not token.isalnum())


def _chat(prompt: str, media: Sequence[Any]) -> Messages:
    """Returns a chat of one user turn: placeholders of its media, then the text."""
    check_text(prompt)
    placed = [{"type": kind(source)} for source in media]
    return [{"role": "user", "content": [*placed, {"type": "text", "text": prompt}]}]


def _request(chat: Any, media: Sequence[Any]) -> tuple[Messages, list[Any]]:
    """Returns (the messages; the loaded media, which are in the messages or given separately)."""
    read, carried = messages.read(chat)
    if len(media) and carried:
        raise UserError(
            f"the messages carry {len(carried)} image(s), video(s) or sound(s), and {len(media)} were given "
            "separately; give all of them in one way"
        )
    return read, [load(source) for source in carried or media]


def _check(reserved: Sequence[str], chat: Messages, media: list[str]) -> None:
    """Raises UserError for reserved tokens in the text, and for media parts that do not match the kinds of `media`."""
    for message in chat:
        text = messages.text_of(message)
        _check_characters(text, "a message")
        found = next((token for token in reserved if token in text), None)
        if found is not None:
            raise UserError(
                f"the text contains '{found}', which this model reserves for media; remove it: "
                "images are placed without it"
            )
    placed = [part["type"] for message in chat for part in messages.parts(message) if part["type"] in KINDS]
    if placed != media:
        raise UserError(
            f"the messages place {_counted(placed)} but {_counted(media)} were given; give what is placed, in order"
        )


def _check_characters(text: str, what: str) -> None:
    """Raises UserError for unpaired surrogates, which come from files or command lines that are not UTF-8."""
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise UserError(
            f"{what} has half a character (U+{ord(half[0]):04X}) at position {half.start()}; it must be UTF-8 text"
        )


def _counted(kinds: list[str]) -> str:
    """Returns a text such as "2 image(s) and 1 video(s)"."""
    return " and ".join(f"{kinds.count(name)} {name}(s)" for name in KINDS if name in kinds or name == "image")


def _supported(processor: Any, kinds: set[str]) -> set[str]:
    """Returns the kinds of media that a processor supports in a batch that contains `kinds`.

    Excludes videos in a batch with images if both produce tensors of the same name, as in SmolVLM.
    """
    supported = {name for name in KINDS if getattr(processor, f"{name}_token", None)}
    names = [getattr(getattr(processor, f"{k}_processor", None), "model_input_names", ()) for k in ("image", "video")]
    return supported - {"video"} if {"image", "video"} <= kinds and set(names[0]) & set(names[1]) else supported


def _with_supported_media(supported: set[str], chat: Messages, media: Sequence[Any]) -> tuple[Messages, list[Any]]:
    """Replaces videos by images if the model supports only images; UserError for other unsupported media."""
    if not media:
        return chat, []
    replaced: list[Any] = []
    remaining = iter(media)

    def supported_parts(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part.get("type") not in KINDS:
            return [part]
        source = next(remaining)
        as_images = part["type"] == "video" and "video" not in supported and "image" in supported
        if part["type"] not in supported and not as_images:
            raise UserError(f"this model supports {' and '.join(sorted(supported)) or 'text'}, not {part['type']}")
        replaced.extend(source.frames if as_images else [source])
        return [{"type": "image"}] * len(source.frames) if as_images else [part]

    chat = [
        {**message, "content": [p for part in messages.parts(message) for p in supported_parts(part)]}
        for message in chat
    ]
    return chat, replaced


def _media_arguments(processor: Any, groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Returns the arguments of a processor call that contain the media."""
    # one list per prompt: some processors split an image into tiles only if it is the only one of its prompt
    images = [[source for source in group if kind(source) == "image"] for group in groups]
    for image in (image for group in images for image in group):
        _check_sides(processor, image)
    arguments: dict[str, Any] = {"images": images if any(images) else None}
    clips = [source for group in groups for source in group if kind(source) == "video"]
    if clips:
        arguments["videos"] = [[np.asarray(frame) for frame in clip.frames] for clip in clips]
        arguments["video_metadata"] = [
            {"total_num_frames": clip.total, "fps": clip.fps, "frames_indices": list(clip.indices),
             "duration": clip.total / clip.fps}
            for clip in clips
        ]  # fmt: skip
        arguments["do_sample_frames"] = False
    sounds = [source for group in groups for source in group if kind(source) == "audio"]
    if sounds:
        if "audio" not in inspect.signature(processor.__call__).parameters:  # Voxtral's
            raise UserError(
                "this model's processor accepts sounds only through its own chat template; "
                "prepare its tensors with that, and pass them to generate(**inputs)"
            )
        rate = processor.feature_extractor.sampling_rate
        arguments |= {"audio": [_samples(processor, sound, rate) for sound in sounds], "sampling_rate": rate}
        if arguments["images"] is None:  # processors of sounds alone do not know the argument
            del arguments["images"]
    return arguments


def _check_sides(processor: Any, image: Image.Image) -> None:
    """Raises UserError for a long, narrow image if the processor scales its short side before it crops: memory."""
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    short, limit = size.get("shortest_edge"), size.get("longest_edge")
    if short and not limit and short**2 * max(image.size) / min(image.size) > MOST_SCALED:
        raise UserError(
            f"an image of {image.width}x{image.height} pixels would be scaled to a short side of {short} pixels for "
            "this model, which makes it too large; crop it"
        )


def _samples(processor: Any, sound: Audio, rate: int) -> Any:
    """Loads a sound [n]; UserError if it is longer than the model's input, since the processor would truncate it."""
    samples, most = sound.load(rate), processor.feature_extractor.n_samples
    if len(samples) > most:
        name = shortened(os.fsdecode(sound.path))
        raise UserError(f"'{name}' is {len(samples) / rate:.0f} s long; the model accepts {most // rate} s: cut it")
    return samples


def _render(processor: Any, chat: Messages) -> str:
    """Renders the chat with the model's template; without a template, joins all parts, one per line."""
    parts = [part for message in chat for part in messages.parts(message)]
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        return "\n".join(p["text"] if p["type"] == "text" else getattr(processor, f"{p['type']}_token") for p in parts)
    try:
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError) as error:  # such as roles that do not alternate, or unexpected contents
        raise UserError(f"this model's chat template does not take these messages ({error})") from error
    for name in KINDS:
        token, wanted = getattr(processor, f"{name}_token", None), sum(part["type"] == name for part in parts)
        if wanted and token and text.count(token) not in (0, wanted):  # 0: some processors insert them later
            raise UserError(
                f"this model's chat template writes {text.count(token)} of {wanted} {name}s; "
                "place them in messages of the user"
            )
    return text
