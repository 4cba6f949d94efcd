"""The trainable parts of the reference model: projector, positions, and low-rank updates of a frozen language model.

Inputs are image features from disk and packed token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from msd.system.files import write_whole
from recipes.reference_vlm.lora import adapt, factors, load_factors
from recipes.reference_vlm.pack import Batch

CELLS, VISION, COLOURS, HIDDEN = 64, 1280, 48, 576
QVO = ("q_proj", "v_proj", "o_proj")
ALL = (*QVO, "k_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Rank and layers of the low-rank updates, and whether the frozen weights are bf16."""

    rank: int = 32
    layers: tuple[str, ...] = ALL
    bf16: bool = True


class Tower(nn.Module):
    """Normalises encoder features, and adds learned positions and a linear map of each cell's colours."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pos = nn.LayerNorm(VISION), nn.Parameter(torch.zeros(CELLS, VISION))
        self.colour = nn.Parameter(torch.zeros(VISION, COLOURS))

    def forward(self, features: Tensor) -> Tensor:
        """[N, 64, 1280 + 48], features and colours of each cell -> [N, 64, 1280]."""
        seen, colours = features.split((VISION, COLOURS), -1)
        out: Tensor = self.norm(seen) + self.pos + colours @ self.colour.T
        return out


class TrainableVLM(nn.Module):
    """A frozen `LlamaForCausalLM` with low-rank updates that reads image tokens among its text embeddings."""

    def __init__(self, lm: Any, config: ModelConfig):
        super().__init__()
        self.config = config
        self.lm = lm.requires_grad_(False)
        # faster than sdpa with a mask (results/settings.md); it needs an additive mask, and silently misreads booleans
        self.lm.set_attn_implementation("eager")
        adapt(self.lm, config.layers, config.rank)
        if config.bf16:
            self._freeze_in(torch.bfloat16)
        self.tower, self.linear_1, self.linear_2 = Tower(), nn.Linear(VISION, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.linear_2.weight, std=0.2 / HIDDEN**0.5)  # near the scale of text embeddings
        nn.init.zeros_(self.linear_2.bias)

    def _freeze_in(self, dtype: torch.dtype) -> None:
        for p in self.lm.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model's frozen weights."""
        dtype: torch.dtype = self.lm.model.embed_tokens.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self.tower.pos.device

    def image_tokens(self, features: Tensor) -> Tensor:
        """[N, 64, 1328] -> [N, 64, 576] float32."""
        tokens: Tensor = self.linear_2(F.gelu(self.linear_1(self.tower(features.float()))))
        return tokens

    def hidden_states(self, batch: Batch) -> Tensor:
        """Returns the last hidden states [B, L, 576] of a packed batch."""
        x = self.lm.model.embed_tokens(batch.ids)
        if len(batch.features):
            tokens = self.image_tokens(batch.features).reshape(-1, HIDDEN).to(x.dtype)
            x = x.masked_scatter(batch.is_image[..., None], tokens)
        mask = torch.zeros(1, dtype=x.dtype, device=x.device).where(batch.mask(), torch.finfo(x.dtype).min)
        out = self.lm.model(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions, use_cache=False)
        states: Tensor = out.last_hidden_state
        return states

    def losses(self, batch: Batch) -> Tensor:
        """Returns the loss [T] float32 of every answer token, in the order of `batch.targets`.

        It is cross entropy -log p, or unlikelihood -log(1 - p) for a token to avoid (Welleck et al. 2020).
        """
        h = self.hidden_states(batch)[batch.rows, batch.columns]
        logits = self.lm.lm_head(h).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        some = logits[batch.avoid]
        others = some.scatter(1, batch.targets[batch.avoid, None], float("-inf"))
        against = some.logsumexp(-1) - others.logsumexp(-1)  # -log(1 - p), exact also where p is almost 1
        return losses.masked_scatter(batch.avoid, against)

    def weights(self) -> dict[str, Tensor]:
        """Returns the trained weights, with the names of the shipped file."""
        out = {n: p.detach() for n, p in self.named_parameters() if not n.startswith("lm.")}
        return out | factors(self.lm, "lm.")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads saved weights. A smaller rank or fewer layers are extended without changing the function."""
        ours = dict(self.named_parameters())
        low_rank = {k: v for k, v in weights.items() if k.startswith("lm.")}
        load_factors(self.lm, low_rank, "lm.")
        with torch.no_grad():
            for name, value in weights.items():
                if name not in low_rank:
                    ours[name].copy_(value)

    def compile_layers(self) -> None:
        """Compiles each decoder layer (they share one graph)."""
        for layer in self.lm.model.layers:
            layer.compile(dynamic=False)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads weights from a shipped `.safetensors` file or a training checkpoint `.pt` (the averaged ones, if any)."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    state = torch.load(path, map_location="cpu", weights_only=True)
    params: dict[str, Tensor] = state.get("averaged", state["params"])
    return params


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes the shipped file, in fp16."""
    write_whole(path, save({k: v.half().contiguous().cpu() for k, v in weights.items()}))


def widths(weights: Mapping[str, Tensor]) -> ModelConfig:
    """Returns the configuration that saved weights were trained with."""
    adapted = [k for k in weights if k.startswith("lm.") and k.endswith(".A")]
    layers = tuple(sorted({k.split(".")[-2] for k in adapted}))
    return ModelConfig(rank=len(weights[adapted[0]]), layers=layers)
