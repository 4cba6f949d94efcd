"""An EventGPT-shaped model: a language model that sees the frames of an event camera (Liu et al., 2024).

A recording becomes frames of equally many events, each goes through a CLIP tower and a projector of two layers, and the
patches of all frames are pooled twice: over the patches of each frame (temporal tokens, F of them), and over the frames
at each patch position (spatial tokens, P).
"""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from msd import events
from msd.cache import KVCache
from msd.drafters import configs
from msd.drafters.eventgpt.config import EventGPTConfig
from msd.events.pieces import Events
from msd.events.pooling import pooled

MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of red, green, blue


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
        own = configs.sizes(text_config) | {"layers": text_config.num_hidden_layers}
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
