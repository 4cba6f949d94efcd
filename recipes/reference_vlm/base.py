"""Loads the pretrained language model and vision encoder that training starts from."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from msd.reference.assemble import load_language_model
from msd.reference.encoder import EfficientNetLite, EfficientNetLiteConfig
from msd.reference.folder import WEIGHTS, locate


def language_model() -> tuple[Any, Any]:
    """Returns SmolLM2-135M-Instruct in float32 and its tokenizer, without the reference model's trained weights."""
    return load_language_model(locate().gguf)


def load_encoder() -> EfficientNetLite:
    """Loads Lite0 at 256x256 with the bundled weights, float32; the trained parts have their initial values."""
    encoder = EfficientNetLite(EfficientNetLiteConfig())
    weights = load_file(WEIGHTS / "encoder.safetensors") | {
        name: value for name, value in encoder.state_dict().items() if name.startswith(("norm.", "position", "colour."))
    }
    encoder.load_state_dict(weights)
    return encoder.eval()
