"""A model with the architecture of EventGPT: a language model that reads frames of an event camera (Liu et al., 2024).

A recording is rendered as F frames of equally many events. A CLIP tower and a two-layer projector encode each frame.
Their P patch features are pooled twice: over the patches of each frame (F temporal tokens), and over the frames at each
patch position (P spatial tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from msd.core.cache import KVCache
from msd.drafters import auxiliary
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError

METHOD = "eventgpt"
SOURCE = "events"  # the auxiliary source that it reads
MEAN, SPREAD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP, for red, green, blue


@dataclass(frozen=True)
class EventGPTConfig(checkpoint.Configuration):
    """H is the language model's hidden size, P the number of patches of a frame.

    frames: F, of equal event count. image_size, patch_size: pixels. vision_*: of the CLIP tower. vision_layer: the
    index of the hidden state that is used, without its class token (-2: the last but one). width, depth: of the draft
    tree, expanded nodes per level and levels. The other fields are LLaMA's.
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
    method: Literal["eventgpt"] = "eventgpt"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or min(self.frames, self.width, self.depth) < 1:
            raise UserError(
                f"frames of {self.image_size} pixels in patches of {self.patch_size}, {self.frames} frames, trees "
                f"{self.width} wide and {self.depth} deep: patches must fill a frame, and all be at least 1"
            )

    @property
    def patches(self) -> int:
        """P, patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """E = F + P, event tokens of a recording."""
        return self.frames + self.patches

    def vision(self) -> CLIPVisionConfig:
        """Returns the config of the CLIP tower."""
        return CLIPVisionConfig(
            hidden_size=self.vision_hidden, intermediate_size=self.vision_intermediate,
            num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_heads,
            image_size=self.image_size, patch_size=self.patch_size,
        )  # fmt: skip

    def text(self) -> LlamaConfig:
        """Returns the config of the language model."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rms_norm_eps=self.eps, max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta}, tie_word_embeddings=False,
        )  # fmt: skip


class EventGPT(nn.Module):
    """Vision tower, projector and LLaMA; H is its hidden size, N its vocabulary size."""

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
        """Creates a small random model with the text sizes of a `transformers` config; `changes` override fields."""
        vision = {
            "vision_hidden": 16, "vision_intermediate": 32, "vision_layers": 2, "vision_heads": 2, "image_size": 16,
            "patch_size": 8,
        }  # fmt: skip
        own = checkpoint.sizes(text_config) | {"layers": text_config.num_hidden_layers}
        return cls(EventGPTConfig(**(own | vision | changes)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def encode(self, recording: Any) -> Tensor:
        """Encodes an `EventStream`, a `Recording` or an event file (docs/events.md) as event tokens [E, H].

        UserError for a file of another format, or a damaged one.
        """
        source = auxiliary.get(SOURCE)
        return self.see(self.pixels(source.frames(source.open(recording), self.config.frames)))

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Preprocesses frames for CLIP: crops the central square, resizes it to S pixels, normalises: [F, 3, S, S]."""
        side = (self.config.image_size, self.config.image_size)
        fitted = [np.asarray(ImageOps.fit(image, side, Image.Resampling.BICUBIC)) for image in images]
        values = torch.from_numpy(np.stack(fitted)).to(next(self.parameters()).device).float() / 255
        mean, spread = (torch.tensor(x, device=values.device) for x in (MEAN, SPREAD))
        return ((values - mean) / spread).permute(0, 3, 1, 2).to(self.dtype)

    def see(self, pixels: Tensor) -> Tensor:
        """Encodes preprocessed frames [F, 3, S, S] as event tokens [F + P, H], temporal then spatial."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states[self.config.vision_layer]
        return auxiliary.pooled(self.projector(states[:, 1:]))  # [F, P, H], without the class token

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeds its token ids [...] as [..., H]."""
        return self.llama.get_input_embeddings()(tokens)

    def states(self, inputs: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Computes the final states [B, S, H] of inputs [B, S, H] at positions [B, S], and caches their keys."""
        return self.llama.model(
            inputs_embeds=inputs, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Computes the logits [..., N] of states [..., H]."""
        return self.llama.lm_head(states)
