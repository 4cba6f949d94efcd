"""Loads the pretrained language model that training starts from."""

from __future__ import annotations

from typing import Any

from msd.reference.assemble import load_language_model
from msd.reference.folder import locate


def language_model() -> tuple[Any, Any]:
    """Returns SmolLM2-135M-Instruct in float32 and its tokenizer, without the reference model's trained weights."""
    return load_language_model(locate().gguf)
