"""Loads the model under evaluation, and generates and scores answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from msd.backends import choose
from msd.reference.assemble import IMAGE_TOKEN, build_model, build_processor
from msd.reference.encoder import EfficientNetLiteConfig
from msd.reference.folder import locate
from msd.train.capture import Answer, Prompt
from recipes.reference_vlm.base import language_model
from recipes.reference_vlm.model import load_weights
from recipes.reference_vlm.writer import GreedyWriter

END = 2
OpenImage = Callable[[str], Image.Image]


def load(path: Path) -> tuple[Any, Any]:
    """Loads a model and its processor from a folder, a `.safetensors` file of trained weights, or a training `.pt`."""
    if path.is_dir():
        import msd.reference  # noqa: F401  (registers the vision tower)

        return AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32
        ).eval(), AutoProcessor.from_pretrained(path)
    lm, tokenizer = language_model()
    vision = EfficientNetLiteConfig()
    processor = build_processor(tokenizer, vision)
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    weights = {k: v.half() for k, v in load_weights(path).items()}  # as shipped
    return build_model(lm, vision, load_file(locate().encoder), weights, token), processor


class Seeing:
    """Computes greedy answers and token log-probabilities for prompts with any number of images."""

    def __init__(self, model: Any, processor: Any, open_image: OpenImage, batch: int = 32):
        self.model, self.processor, self.open_image, self.batch = model, processor, open_image, batch
        self.processor.tokenizer.padding_side = "left"

    def prompt(self, p: Prompt) -> str:
        """Returns the prompt in chat format: images first, one per line."""
        images = f"{IMAGE_TOKEN}\n" * len(p.images)
        return f"<|im_start|>user\n{images}{p.text}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns left-padded model inputs; `answers` are appended to the prompts."""
        texts = [self.prompt(p) + (answers[i] if answers else "") for i, p in enumerate(prompts)]
        images = [self.open_image(name) for p in prompts for name in p.images]
        inputs = self.processor(
            text=texts, images=images or None, padding=True, return_tensors="pt", add_special_tokens=False
        )
        return {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Returns one greedy answer per prompt, in order."""
        write = GreedyWriter(self.model, self.processor.tokenizer, self.encode, max_new_tokens, END)
        out: list[Answer] = []
        for start in range(0, len(prompts), self.batch):
            out += write(prompts[start : start + self.batch])
        return out

    @torch.inference_mode()
    def teacher_forced(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> tuple[float, float]:
        """Returns the mean negative log-likelihood of the answer tokens, and the share that are the top token."""
        loss, correct, count = 0.0, 0, 0
        size = max(1, self.batch // 2)
        for start in range(0, len(prompts), size):
            group, texts = prompts[start : start + size], answers[start : start + size]
            inputs = {k: v.to(self.model.device) for k, v in self.encode(group, texts).items()}
            lengths = [len(self.processor.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
            keep = max(lengths) + 1
            with choose(self.model).running():
                logits = self.model(**inputs, logits_to_keep=keep).logits.float()
            for row, n in enumerate(lengths):
                target = inputs["input_ids"][row, -n:]
                predicted = logits[row, -n - 1 : -1]
                loss += float(F.cross_entropy(predicted, target, reduction="sum"))
                correct += int((predicted.argmax(-1) == target).sum())
                count += n
        return loss / max(1, count), correct / max(1, count)
