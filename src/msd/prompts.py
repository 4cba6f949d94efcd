"""From images and words to processor output: chat template, placeholders, and what is refused.

User text that spells an image placeholder would be taken for an image, so it is refused (CVE-2026-44222).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msd.errors import UserError
from msd.images import load_image

Messages = list[dict[str, Any]]


def prepare(
    processor: Any, images: Sequence[Any], prompts: Sequence[str] | None = None, chats: Sequence[Messages] | None = None
) -> dict[str, Any]:
    """Processor output for a batch.

    images: one list of image sources per request (paths, bytes, PIL images, arrays). prompts: one text per request; or
    chats: one message list per request in `transformers`' format, `{"type": "image"}` parts marking the images' places.
    Returns input_ids [B, L] (left-padded), attention_mask [B, L], pixel tensors when there are images.
    """
    if chats is None:
        chats = [_single_turn(prompt, len(group)) for prompt, group in zip(prompts or (), images, strict=True)]
    for chat, group in zip(chats, images, strict=True):
        _check(processor, chat, len(group))
    texts = [_render(processor, chat) for chat in chats]
    # by prompt, because some processors cut an image into tiles only where it is its prompt's only one
    pictures = [[load_image(source) for source in group] for group in images]
    processor.tokenizer.padding_side = "left"
    special = _adds_bos(texts, processor)
    try:
        batch = processor(
            images=pictures if any(pictures) else None,
            text=texts,
            padding=len(texts) > 1,
            return_tensors="pt",
            add_special_tokens=special,
        )
    except ValueError as error:
        if any(pictures):
            raise
        raise UserError(f"this model's processor takes no prompt without an image ({error})") from error  # PaliGemma
    return {name: tensor for name, tensor in batch.items() if name != "labels"}  # PaliGemma's, for training


def check_text(prompt: str) -> None:
    """Refuses what cannot be a prompt: anything but text, and text without a word in it."""
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise UserError("the prompt is empty; say what you want to know, for example 'Describe the image.'")


def _single_turn(prompt: str, images: int) -> Messages:
    """One user turn: the images, then the words."""
    check_text(prompt)
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}]


def _check(processor: Any, chat: Messages, images: int) -> None:
    """Refuses placeholders in user text and a wrong number of images."""
    tokens = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    marks = 0
    for message in chat:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        marks += sum(part.get("type") == "image" for part in parts)
        for token in filter(None, tokens):
            if any(token in part.get("text", "") for part in parts):
                raise UserError(
                    f"the text contains '{token}', which this model reserves for pictures; remove it: "
                    "images are put in place without it"
                )
    if marks != images:
        raise UserError(f"the messages place {marks} image(s) but {images} were given; give as many as are placed")


def _render(processor: Any, chat: Messages) -> str:
    """The chat as the model's own template writes it; without a template, images first, then the words."""
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    parts = [p for m in chat for p in ([{"text": m["content"]}] if isinstance(m["content"], str) else m["content"])]
    return "\n".join(processor.image_token if p.get("type") == "image" else p["text"] for p in parts)


def _adds_bos(texts: Sequence[str], processor: Any) -> bool:
    """Whether the tokenizer must add special tokens: not when the template wrote the first one already."""
    bos = processor.tokenizer.bos_token
    return not (bos and all(text.startswith(bos) for text in texts))
