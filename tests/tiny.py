"""Tiny random targets: real architectures, a few thousand weights, made in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

IMAGE = 3  # placeholder id
EOS, PAD = 2, 0


def _text(vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip


def _finish(model: PreTrainedModel, sharpness: float) -> Any:
    """Random weights give nearly flat distributions; a sharper head gives them shape, as a trained model's have."""
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model.eval()


def llava(vocab: int = 64, seed: int = 0, sharpness: float = 40.0) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small: 4 image tokens per 16x16 image."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=_vision(), text_config=_text(vocab), image_token_id=IMAGE, image_seq_length=4,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return _finish(LlavaForConditionalGeneration(config), sharpness)


def llava_next(vocab: int = 64, seed: int = 0, sharpness: float = 40.0) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT in small: one 16x16 base tile and tiles of 16x32 or 32x16."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=_vision(), text_config=_text(vocab), image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return _finish(LlavaNextForConditionalGeneration(config), sharpness)


def llava_inputs(seed: int = 0, images: int = 1, words: int = 12, vocab: int = 64) -> dict[str, torch.Tensor]:
    """Processor output for one prompt: words, images of 4 placeholders each, words that repeat themselves."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(4, vocab, (words,), generator=g).tolist()
    ids = [1, *text[:3], *[IMAGE] * (4 * images), *text, *text[: words // 2]]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=g)
    return inputs


def llava_next_inputs(seed: int = 0, words: int = 12, vocab: int = 64) -> dict[str, torch.Tensor]:
    """Processor output for one wide image: base tile (4) and a 2x4 grid of patches with a newline per row (10)."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(4, vocab, (words,), generator=g).tolist()
    ids = [1, *text[:3], *[IMAGE] * 14, *text, *text[: words // 2]]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 3, 16, 16, generator=g),
        "image_sizes": torch.tensor([[16, 32]]),
    }


def batch(*rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left-pads single prompts into one batch."""
    width = max(r["input_ids"].shape[1] for r in rows)

    def pad(x: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (width - x.shape[1], 0), value=value)

    out = {
        "input_ids": torch.cat([pad(r["input_ids"], PAD) for r in rows]),
        "attention_mask": torch.cat([pad(r["attention_mask"], 0) for r in rows]),
    }
    for name in ("pixel_values", "image_sizes"):
        found = [r[name] for r in rows if name in r]
        if found:
            out[name] = torch.cat(found)
    return out
