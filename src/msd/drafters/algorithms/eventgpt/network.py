"""An EventGPT-shaped model: a language model that sees the frames of an event camera (Liu et al., 2024).

A recording becomes frames of equally many events, each goes through a CLIP tower and a projector of two layers, and the
patches of all frames are pooled twice: over the patches of each frame (temporal tokens, F of them), and over the frames
at each patch position (spatial tokens, P).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from msd import events
from msd.core.cache import KVCache
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.events.pooling import pooled
from msd.events.recording import Events

METHOD = "eventgpt"
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of red, green, blue


@dataclass(frozen=True)
class EventGPTConfig(checkpoint.Configuration):
    """H is the language model's hidden size, P the patches of a frame.

    frames: of equal event count. image_size, patch_size: pixels. vision_*: of the CLIP tower; vision_layer: which of
    its hidden states is taken, as LLaVA counts (-2: the last but one), without the class token. width, depth: of the
    draft tree, nodes that go on per level and the number of levels. The rest is LLaMA's.
    """

    owner: ClassVar[str] = "an EventGPT drafter"
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    vision_layer: int = -2
    frames: int = 5
    rope_theta: float = 10000.0
    eps: float = 1e-5
    positions: int = 2048
    width: int = 4
    depth: int = 6
    method: str = METHOD

    def __post_init__(self) -> None:
        if self.method != METHOD:
            raise UserError(f"its config.json is of method '{self.method}', not '{METHOD}'")
        if self.image_size % self.patch_size or min(self.frames, self.width, self.depth) < 1:
            raise UserError(
                f"frames of {self.image_size} pixels in patches of {self.patch_size}, {self.frames} frames, trees "
                f"{self.width} wide and {self.depth} deep: patches must fill a frame, and all be at least 1"
            )

    @property
    def patches(self) -> int:
        """P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """E, event tokens of a recording: one for each frame, and one for each patch position."""
        return self.frames + self.patches

    def vision(self) -> CLIPVisionConfig:
        """The tower's, as `transformers` has it."""
        return CLIPVisionConfig(
            hidden_size=self.vision_hidden, intermediate_size=self.vision_intermediate,
            num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_heads,
            image_size=self.image_size, patch_size=self.patch_size,
        )  # fmt: skip

    def text(self) -> LlamaConfig:
        """The language model's."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rms_norm_eps=self.eps, max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta}, tie_word_embeddings=False,
        )  # fmt: skip


class EventGPT(nn.Module):
    """Vision tower, projector and LLaMA; H is its hidden size, N its vocabulary."""

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = CLIPVisionModel(config.vision())
        self.projector = nn.Sequential(
            nn.Linear(config.vision_hidden, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )
        self.llama = LlamaForCausalLM(config.text())

    @classmethod
    def for_text(cls, text_config: Any, **changes: Any) -> Self:
        """A small one with random weights, its text sizes those of a `transformers` text config; `changes` override."""
        vision = {
            "vision_hidden": 16, "vision_intermediate": 32, "vision_layers": 2, "vision_heads": 2, "image_size": 16,
            "patch_size": 8,
        }  # fmt: skip
        own = checkpoint.sizes(text_config) | {"layers": text_config.num_hidden_layers}
        return cls(EventGPTConfig(**(own | vision | changes)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = self.projector[0].weight.dtype  # type: ignore[assignment]
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, recording: Events | str | os.PathLike[str]) -> Tensor:
        """The event tokens [E, H] of a stream, a recording or an event file (formats: docs/events.md).

        UserError for a file that is none, or is broken.
        """
        if isinstance(recording, str | os.PathLike):
            recording = events.open_chunks(recording)
        images = events.frames(recording, count=self.config.frames, by="count")
        return self.see(self.pixels(images))

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Frames [F, 3, S, S] as CLIP takes them: the largest square in the middle, S pixels wide."""
        side = (self.config.image_size, self.config.image_size)
        fitted = [np.asarray(ImageOps.fit(image, side, Image.Resampling.BICUBIC)) for image in images]
        values = torch.from_numpy(np.stack(fitted)).to(self.device).float() / 255
        mean, spread = (torch.tensor(x, device=values.device) for x in (MEAN, SPREAD))
        return ((values - mean) / spread).permute(0, 3, 1, 2).to(self.dtype)

    def see(self, pixels: Tensor) -> Tensor:
        """Frames [F, 3, S, S] -> event tokens [F + P, H]: temporal ones, then spatial ones."""
        seen = self.tower(pixels, output_hidden_states=True).hidden_states[self.config.vision_layer]
        return pooled(self.projector(seen[:, 1:]))  # [F, P, H], without the class token

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., H] of its token ids [...]."""
        out: Tensor = self.llama.get_input_embeddings()(tokens)
        return out

    def states(
        self, inputs: Tensor, positions: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Final states [B, W, H] of inputs [B, W, H] at positions [B, W].

        They are written behind what the cache has committed. mask: [B, 1, W, S], additive; without one, each sees those
        before it.
        """
        out: Tensor = self.llama.model(
            inputs_embeds=inputs, position_ids=positions, past_key_values=cache, attention_mask=mask,
            use_cache=cache is not None,
        ).last_hidden_state  # fmt: skip
        return out

    def logits(self, states: Tensor) -> Tensor:
        """[..., N] of states [..., H]."""
        out: Tensor = self.llama.lm_head(states)
        return out
