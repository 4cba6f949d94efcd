"""From images, videos, sounds and words to processor output: chat template, placeholders, and what is refused.

User text that spells a placeholder would be taken for an image, so it is refused (CVE-2026-44222).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.images import load_image
from msd.sounds import Audio
from msd.videos import Clip, Video

Messages = list[dict[str, Any]]
KINDS = ("image", "video", "audio")


def prepare(
    processor: Any,
    shown: Sequence[Sequence[Any]],
    prompts: Sequence[str] | None = None,
    chats: Sequence[Messages] | None = None,
) -> dict[str, Any]:
    """Processor output for a batch.

    shown: one list per request of what it shows, in reading order: images (paths, bytes, PIL images, arrays), `Video`s
    or `Clip`s, `Audio`s. prompts: one text per request; or chats: one message list per request in `transformers`'
    format, with `{"type": "image"}`, `{"type": "video"}` and `{"type": "audio"}` parts marking their places.
    A model that takes images but no videos is shown the frames of a video as images.
    Returns input_ids [B, L] (left-padded), attention_mask [B, L], and the tensors of what is shown.
    """
    loaded = [[load(source) for source in group] for group in shown]
    if chats is None:
        chats = [_single_turn(prompt, group) for prompt, group in zip(prompts or (), loaded, strict=True)]
    for chat, group in zip(chats, loaded, strict=True):
        _check(processor, chat, [kind(source) for source in group])
    takes = _takes(processor, {kind(source) for group in loaded for source in group})
    seen = [_as_taken(takes, chat, group) for chat, group in zip(chats, loaded, strict=True)]
    texts = [_render(processor, chat) for chat, _ in seen]
    processor.tokenizer.padding_side = "left"
    special = _adds_bos(texts, processor)
    groups = [group for _, group in seen]
    given = _media(processor, groups)
    try:
        batch = processor(text=texts, padding=len(texts) > 1, return_tensors="pt", add_special_tokens=special, **given)
    except ValueError as error:
        if any(groups):
            raise
        raise UserError(f"this model's processor takes no prompt without an image ({error})") from error  # PaliGemma
    return {name: tensor for name, tensor in batch.items() if name != "labels"}  # PaliGemma's, for training


def load(source: Any) -> Any:
    """An image, or the frames of a video; sounds are decoded later, at the rate that the model hears."""
    if isinstance(source, Clip | Audio):
        return source
    return source.load() if isinstance(source, Video) else load_image(source)


def kind(source: Any) -> str:
    """ "image", "video" or "audio"."""
    return "video" if isinstance(source, Video | Clip) else "audio" if isinstance(source, Audio) else "image"


def check_text(prompt: str) -> None:
    """Refuses what cannot be a prompt: anything but text, and text without a word in it."""
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise UserError("the prompt is empty; say what you want to know, for example 'Describe the image.'")


def _single_turn(prompt: str, shown: Sequence[Any]) -> Messages:
    """One user turn: what is shown, then the words."""
    check_text(prompt)
    parts = [{"type": kind(source)} for source in shown]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check(processor: Any, chat: Messages, shown: list[str]) -> None:
    """Refuses placeholders in user text, and places that are not those of what is shown."""
    parts = [part for message in chat for part in _parts(message)]
    for token in filter(None, (getattr(processor, f"{name}_token", None) for name in KINDS)):
        if any(token in part.get("text", "") for part in parts):
            raise UserError(
                f"the text contains '{token}', which this model reserves for what it is shown; remove it: "
                "images are put in place without it"
            )
    marks = [part["type"] for part in parts if part.get("type") in KINDS]
    if marks != shown:
        raise UserError(
            f"the messages place {_counted(marks)} but {_counted(shown)} were given; give what is placed, in order"
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


def _rate(processor: Any) -> int:
    """Samples a second that the model hears."""
    return processor.feature_extractor.sampling_rate


def _heard(processor: Any, sound: Audio) -> Any:
    """A sound [n], as far as the model hears at once: its processor would drop the rest."""
    samples, most = sound.load(_rate(processor)), processor.feature_extractor.n_samples
    if len(samples) > most:
        rate = _rate(processor)
        raise UserError(
            f"'{sound.path}' is {len(samples) / rate:.0f} s long; this model hears {most // rate} s: cut it"
        )
    return samples


def _render(processor: Any, chat: Messages) -> str:
    """The chat as the model's own template writes it; without a template, all parts in their order, one a line."""
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    parts = [part for message in chat for part in _parts(message)]
    return "\n".join(getattr(processor, f"{p['type']}_token") if p.get("type") in KINDS else p["text"] for p in parts)


def _adds_bos(texts: Sequence[str], processor: Any) -> bool:
    """Whether the tokenizer must add special tokens: not when the template wrote the first one already."""
    bos = processor.tokenizer.bos_token
    return not (bos and all(text.startswith(bos) for text in texts))
