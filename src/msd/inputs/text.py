"""`TextProcessor`: a language model's tokenizer in the form of a processor, for prompts without media."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msd.inputs import messages
from msd.inputs.messages import Messages


class TextProcessor:
    """Prepares chats with the tokenizer's own template; each message is one text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def apply_chat_template(self, chat: Messages, **options: Any) -> str:
        """Renders a chat. The parts of a message are joined by line breaks."""
        texts = ["\n".join(part["text"] for part in messages.parts(message)) for message in chat]
        joined = [{**message, "content": text} for message, text in zip(chat, texts, strict=True)]
        rendered: str = self.tokenizer.apply_chat_template(joined, **options)
        return rendered

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> Any:
        """Tokenizes a batch. images: None."""
        return self.tokenizer(text, return_token_type_ids=False, **options)
