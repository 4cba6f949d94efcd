"""A real tokenizer with the ids of the tiny families: one token per letter."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from family_layouts import VOCABULARY

SIZE = {"height": 16, "width": 16}
CROP: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": SIZE}


def tokenizer(
    image: str = "<image>",
    start: str = "<start>",
    end: str = "<end>",
    extra: tuple[str, ...] = (),
    audio: str = "<audio>",
    **more: Any,
) -> Any:
    """Ids as in the tiny families, then `extra` special tokens, then letters up to the vocabulary size."""
    special = ["<pad>", "<s>", "</s>", image, "<video>", audio, start, end, "<break>", *extra]
    letters = ["Ġ", "Ċ", *"abcdefghijklmnopqrstuvwxyz.?"]
    vocabulary = {token: i for i, token in enumerate((special + letters)[:VOCABULARY])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=more
    )
