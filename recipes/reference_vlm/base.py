"""The untouched parts that training starts from."""

from __future__ import annotations

from typing import Any

from msd.reference.assemble import load_language_model
from msd.reference.folder import locate


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, float32, and its tokenizer: `msd.reference.language_model` without trained weights."""
    return load_language_model(locate().gguf)
