"""From images, videos, sounds and words to processor output: chat template, placeholders, and what is refused.

User text that spells a placeholder would be taken for an image, so it is refused (CVE-2026-44222). Text that spells a
mark of turns, such as `<|im_end|>`, is read as that mark, as `transformers` reads it: who lets others write a prompt
takes them out first.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
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

# in the tokens that stand for or around what is shown, and in their names
MEDIA = re.compile(r"image|img|vision|video|audio|sound|frame|row_\d|\b[be]oi", re.IGNORECASE)

MOST_SCALED = 400 * 1000 * 1000  # pixels of a picture that a processor has scaled but not yet cropped


def prepare(
    processor: Any,
    shown: Sequence[Sequence[Any]],
    prompts: Sequence[str] | None = None,
    chats: Sequence[Messages] | None = None,
) -> dict[str, Any]:
    """Processor output for a batch.

    shown: one list per request of what it shows, in reading order: images (paths, bytes, PIL images, arrays), `Video`s
    or `Clip`s, `Audio`s. prompts: one text per request; or chats: one message list per request, whose parts mark the
    places of what is shown or carry it themselves (see `msd.inputs.messages`).
    A model that takes images but no videos is shown the frames of a video as images.
    Returns input_ids [B, L] (left-padded), attention_mask [B, L], and the tensors of what is shown.
    """
    requests = _asked(prompts or (), shown) if chats is None else _read(chats, shown)
    reserved = placeholders(processor)
    for chat, group in requests:
        _check(reserved, chat, [kind(source) for source in group])
    takes = _takes(processor, {kind(source) for _, group in requests for source in group})
    seen = [_as_taken(takes, chat, group) for chat, group in requests]
    texts = [_render(processor, chat) for chat, _ in seen]
    processor.tokenizer.padding_side = "left"
    special = _adds_bos(texts, processor)
    groups = [group for _, group in seen]
    given = _media(processor, groups)
    try:
        batch = processor(text=texts, padding=len(texts) > 1, return_tensors="pt", add_special_tokens=special, **given)
    except ValueError as error:
        what = "does not take what is shown" if any(groups) else "takes no prompt without an image"  # PaliGemma
        raise UserError(f"this model's processor {what} ({error})") from error
    return {name: tensor for name, tensor in batch.items() if name != "labels"}  # PaliGemma's, for training


def grouped(images: Any, count: int) -> list[list[Any]]:
    """What each of `count` prompts shows: `images` is one source for all, or a list with one entry for each."""
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
    """An image, or the frames of a video; sounds are decoded later, at the rate that the model hears."""
    if isinstance(source, Clip | Audio):
        return source
    return source.load() if isinstance(source, Video) else load_image(source)


def kind(source: Any) -> str:
    """ "image", "video" or "audio"."""
    return "video" if isinstance(source, Video | Clip) else "audio" if isinstance(source, Audio) else "image"


def check_text(prompt: str) -> None:
    """Refuses what cannot be a prompt: anything but text, text without a word in it, and halves of characters."""
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise UserError("the prompt is empty; say what you want to know, for example 'Describe the image.'")
    _check_characters(prompt, "the prompt")


def placeholders(processor: Any) -> list[str]:
    """What a processor reserves for what it is shown: the marks it expands, and all that it expands them to."""
    tokenizer = processor.tokenizer
    named = {**vars(processor), **getattr(tokenizer, "special_tokens_map", {})}
    named |= {f"{name}_token": getattr(processor, f"{name}_token", None) for name in KINDS}
    marks = {str(token) for name, token in named.items() if re.search(r"_(token|tag)$", name) and MEDIA.search(name)}
    added = (t for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False))
    marks |= {text for text in (getattr(token, "content", "") for token in added) if MEDIA.search(text)}
    return sorted(mark for mark in marks if mark != "None" and not mark.isalnum())


def _asked(prompts: Sequence[str], shown: Sequence[Sequence[Any]]) -> list[tuple[Messages, list[Any]]]:
    """(one user turn: what is shown, then the words; what is shown, loaded) of every prompt."""
    requests = []
    for prompt, group in zip(prompts, shown, strict=True):
        check_text(prompt)
        loaded = [load(source) for source in group]
        parts = [{"type": kind(source)} for source in loaded]
        requests.append(([{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}], loaded))
    return requests


def _read(chats: Sequence[Any], shown: Sequence[Sequence[Any]]) -> list[tuple[Messages, list[Any]]]:
    """(the messages, what they show, loaded) of every chat, whether it is given beside the messages or carried."""
    requests = []
    for given, group in zip(chats, shown, strict=True):
        chat, carried = messages.read(given)
        if len(group) and carried:
            raise UserError(
                f"the messages carry {len(carried)} image(s), video(s) or sound(s), and {len(group)} were given "
                "beside them; give all of them in one way"
            )
        requests.append((chat, [load(source) for source in carried or group]))
    return requests


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check(reserved: Sequence[str], chat: Messages, shown: list[str]) -> None:
    """Refuses placeholders in user text, and places that are not those of what is shown."""
    for message in chat:
        text = messages.text_of(message)
        _check_characters(text, "a message")
        found = next((token for token in reserved if token in text), None)
        if found is not None:
            raise UserError(
                f"the text contains '{found}', which this model reserves for what it is shown; remove it: "
                "images are put in place without it"
            )
    parts = [part for message in chat for part in _parts(message)]
    marks = [part["type"] for part in parts if part["type"] in KINDS]
    if marks != shown:
        raise UserError(
            f"the messages place {_counted(marks)} but {_counted(shown)} were given; give what is placed, in order"
        )


def _check_characters(text: str, what: str) -> None:
    """Refuses halves of characters, which no tokenizer takes: of a file or a command line that is not UTF-8."""
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise UserError(
            f"{what} has half a character (U+{ord(half[0]):04X}) at position {half.start()}; it must be UTF-8 text"
        )


def _counted(kinds: list[str]) -> str:
    """Such as "2 image(s) and 1 video(s)"."""
    return " and ".join(f"{kinds.count(name)} {name}(s)" for name in KINDS if name in kinds or name == "image")


def _takes(processor: Any, kinds: set[str]) -> set[str]:
    """What a processor takes of a batch that shows `kinds`; no videos beside images if it would write one over the
    other, as SmolVLM's does, whose pixels of both have one name.
    """
    takes = {name for name in KINDS if getattr(processor, f"{name}_token", None)}
    names = [getattr(getattr(processor, f"{k}_processor", None), "model_input_names", ()) for k in ("image", "video")]
    return takes - {"video"} if {"image", "video"} <= kinds and set(names[0]) & set(names[1]) else takes


def _as_taken(takes: set[str], chat: Messages, shown: Sequence[Any]) -> tuple[Messages, list[Any]]:
    """The chat and what it shows, videos as images where the model takes no videos; UserError for what it takes not."""
    found: list[Any] = []
    left = iter(shown)

    def places(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part.get("type") not in KINDS:
            return [part]
        source = next(left)
        as_images = part["type"] == "video" and "video" not in takes and "image" in takes
        if part["type"] not in takes and not as_images:
            raise UserError(f"this model takes {' and '.join(sorted(takes)) or 'text'}, not {part['type']}")
        found.extend(source.frames if as_images else [source])
        return [{"type": "image"}] * len(source.frames) if as_images else [part]

    written = [{**message, "content": [p for part in _parts(message) for p in places(part)]} for message in chat]
    return (written if shown else chat), found


def _media(processor: Any, groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What a processor takes beside the text."""
    # images by prompt, because some processors cut one into tiles only where it is its prompt's only one
    images = [[source for source in group if kind(source) == "image"] for group in groups]
    for image in (image for group in images for image in group):
        _check_sides(processor, image)
    given: dict[str, Any] = {"images": images if any(images) else None}
    clips = [source for group in groups for source in group if kind(source) == "video"]
    if clips:
        given["videos"] = [[np.asarray(frame) for frame in clip.frames] for clip in clips]
        given["video_metadata"] = [
            {"total_num_frames": clip.total, "fps": clip.fps, "frames_indices": list(clip.indices),
             "duration": clip.total / clip.fps}
            for clip in clips
        ]  # fmt: skip
        given["do_sample_frames"] = False
    sounds = [source for group in groups for source in group if kind(source) == "audio"]
    if sounds:
        if "audio" not in inspect.signature(processor.__call__).parameters:  # Voxtral's
            raise UserError(
                "this model's processor takes sounds by a chat template of its own alone; "
                "make its tensors with that, and give them to generate(**inputs)"
            )
        given = {"audio": [_heard(processor, sound) for sound in sounds], "sampling_rate": _rate(processor)}
    return given


def _check_sides(processor: Any, image: Image.Image) -> None:
    """Refuses a picture so long that a processor that scales its short side, and only then crops, would fill memory."""
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    short, limit = size.get("shortest_edge"), size.get("longest_edge")
    if short and not limit and short**2 * max(image.size) / min(image.size) > MOST_SCALED:
        raise UserError(
            f"an image of {image.width}x{image.height} pixels would be scaled to a short side of {short} pixels for "
            "this model, which makes it too large; crop it"
        )


def _rate(processor: Any) -> int:
    """Samples a second that the model hears."""
    return processor.feature_extractor.sampling_rate


def _heard(processor: Any, sound: Audio) -> Any:
    """A sound [n], as far as the model hears at once: its processor would drop the rest."""
    samples, most = sound.load(_rate(processor)), processor.feature_extractor.n_samples
    if len(samples) > most:
        rate, name = _rate(processor), shortened(os.fsdecode(sound.path))
        raise UserError(f"'{name}' is {len(samples) / rate:.0f} s long; this model hears {most // rate} s: cut it")
    return samples


def _render(processor: Any, chat: Messages) -> str:
    """The chat as the model's own template writes it; without a template, all parts in their order, one a line."""
    parts = [part for message in chat for part in _parts(message)]
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        return "\n".join(p["text"] if p["type"] == "text" else getattr(processor, f"{p['type']}_token") for p in parts)
    try:
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError) as error:  # such as roles that do not take turns; contents it does not expect
        raise UserError(f"this model's chat template does not take these messages ({error})") from error
    for name in KINDS:
        mark, wanted = getattr(processor, f"{name}_token", None), sum(part["type"] == name for part in parts)
        if wanted and mark and text.count(mark) not in (0, wanted):  # 0: some processors put them in place themselves
            raise UserError(
                f"this model's chat template writes {text.count(mark)} of {wanted} {name}s; "
                "place them in messages of the user"
            )
    return text


def _adds_bos(texts: Sequence[str], processor: Any) -> bool:
    """Whether the tokenizer must add special tokens: not when the template wrote the first one already."""
    bos = processor.tokenizer.bos_token
    return not (bos and all(text.startswith(bos) for text in texts))
