"""Writes the reference model as checkpoints that vLLM serves, and its prompts as vLLM reads them (docs/vllm.md).

vLLM has no vision tower like the reference model's. Two checkpoints stand for it: its language model alone, a LLaMA;
and a LLaVA whose config names a CLIP tower that is never built, because its photos arrive as the projector's output.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from msd import reference

TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
EMBEDDINGS = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}  # arguments of `vllm.LLM`


def language_model(folder: Path) -> Path:
    """Writes the language model to `folder`, which it returns: `LlamaForCausalLM`, float32, 540 MB."""
    source, config, state = _opened(folder)
    start = "model.language_model." if any(n.startswith("model.language_model.") for n in state) else "language_model."
    text = {f"model.{n.removeprefix(start).removeprefix('model.')}": t for n, t in state.items() if n.startswith(start)}
    _write(folder, text, config["text_config"] | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
    _copy(source, folder, TEXT)
    return folder


def vision_language_model(folder: Path) -> Path:
    """Writes the model without its tower to `folder`, which it returns: `LlavaForConditionalGeneration`, 540 MB.

    The config's tower has the number of tokens of a photo: 64 patches and a class token, which "default" leaves out.
    """
    source, config, state = _opened(folder)
    vision = config["vision_config"]
    config["vision_config"] = {
        "model_type": "clip_vision_model", "num_hidden_layers": 1, "num_attention_heads": 16, "projection_dim": 64,
        "hidden_size": vision["hidden_size"], "intermediate_size": vision["hidden_size"],
        "image_size": vision["image_size"], "patch_size": vision["patch_size"],
    }  # fmt: skip
    config["vision_feature_select_strategy"] = "default"
    _write(folder, {n: t for n, t in state.items() if "vision_tower" not in n and n != "lm_head.weight"}, config)
    _copy(source, folder, TEXT)
    processor = json.loads((source / "processor_config.json").read_text())
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    return folder


def text_prompt(processor: Any, prompt: str) -> dict[str, Any]:
    """Returns a prompt of `vllm_run` without a photo."""
    return {"ids": processor(text=_chat(processor, prompt), return_tensors="pt")["input_ids"][0].tolist()}


def photo_prompt(model: Any, processor: Any, photo: Path, prompt: str, file: Path) -> dict[str, Any]:
    """Returns a prompt of `vllm_run` with a photo, whose embeddings are written to `file`."""
    text = _chat(processor, prompt, image=True)
    with Image.open(photo) as image:
        inputs = processor(images=[image.convert("RGB")], text=text, return_tensors="pt")
    with torch.inference_mode():
        found = model.get_image_features(pixel_values=inputs["pixel_values"])
    tokens = getattr(found, "pooler_output", found)[0]
    save_file({"image": tokens.reshape(-1, tokens.shape[-1]).contiguous()}, file)
    return {"ids": once(inputs["input_ids"][0].tolist(), model.config.image_token_id), "embeddings": str(file)}


def once(ids: list[int], image: int) -> list[int]:
    """Returns ids with one placeholder for each image, in place of one for each of its tokens."""
    return [token for i, token in enumerate(ids) if token != image or i == 0 or ids[i - 1] != image]


def _chat(processor: Any, prompt: str, image: bool = False) -> str:
    parts = [{"type": "image"}] * image + [{"type": "text", "text": prompt}]
    text: str = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return text


def _opened(folder: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Makes `folder`; returns the reference model's own, its config and its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    source = reference.path()
    return source, json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copy(source / name, folder)
