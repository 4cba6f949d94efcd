"""Tiny random targets with multi-token-prediction layers, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

import recurrent_models as hybrids
from family_layouts import BOS, END, EOS, IMAGE, PAD, START, VOCABULARY, WORDS
from family_models import built
from msd.drafters.toolkit.mtp_network import declared

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
GROUPS = {**EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": PAD, "moe_intermediate_size": 32,
    }  # fmt: skip


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, so that images matter and the distributions are not uniform."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=0.02)
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                weight.mul_(6)
        model.get_output_embeddings().weight.mul_(10)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def kimi_k25(layers: int) -> PreTrainedModel:
    """Latent attention: keys and values have different sizes."""
    torch.manual_seed(0)
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text = _sizes() | GROUPS | ranks | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "num_mtp_layers": layers}
    vision = VISION | {"merge_kernel_size": (2, 2), "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 4}
    more = {"projection_hidden_size": 16, "tie_word_embeddings": False}
    return _finished(built("kimi_k25", {"text_config": text, "vision_config": vision, **hybrids._MARKS, **more}))


def glm4_moe(layers: int) -> PreTrainedModel:
    """A text model with a mixture of experts."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(**_sizes(), **GROUPS, num_key_value_heads=2, head_dim=8, num_mtp_layers=layers)
    return _finished(Glm4MoeForCausalLM(config))


def step3p7(layers: int) -> PreTrainedModel:
    """Sliding windows, also in the multi-token-prediction layers."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * layers
    text = _sizes() | EXPERTS | {
        "num_key_value_heads": 2, "head_dim": 8, "share_expert_dim": 32, "layer_types": kinds, "sliding_window": 12,
        "mlp_layer_types": ["dense", "sparse", "sparse"] + ["dense"] * layers, "num_nextn_predict_layers": layers,
    }  # fmt: skip
    config = {"text_config": text, "vision_config": VISION | {"image_size": 32}, "image_token_id": IMAGE}
    return _finished(built("step3p7", config))


def _qwen3_5(kind: str, layers: int, **more: Any) -> PreTrainedModel:
    """A hybrid with M-RoPE, whose checkpoints count the layers under a name of their own."""
    torch.manual_seed(0)
    text = hybrids._delta_net(**more, mtp_num_hidden_layers=layers)
    text |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "tie_word_embeddings": False}
    return _finished(built(kind, {"text_config": text, "vision_config": hybrids._PATCH, **hybrids._MARKS}))


def qwen3_5(layers: int) -> PreTrainedModel:
    """Dense."""
    return _qwen3_5("qwen3_5", layers)


def qwen3_5_moe(layers: int) -> PreTrainedModel:
    """With a mixture of experts, also in the multi-token-prediction layers."""
    return _qwen3_5("qwen3_5_moe", layers, **hybrids._EXPERTS)


@dataclass(frozen=True)
class MtpTarget:
    """make: a model with a number of layers. pixels: the tensors of n images; None for a text model. places: tokens.

    typed: the processor returns token types.
    """

    make: Callable[[int], PreTrainedModel]
    pixels: Callable[[int, torch.Generator], dict[str, Any]] | None = None
    places: int = 0
    typed: bool = False

    def inputs(self, rows: int, words: int = 14) -> dict[str, Any]:
        """Prompts of different lengths, left-padded, with an image in each."""
        ids, g = [], torch.Generator().manual_seed(0)
        for row in range(rows):
            text = torch.randint(WORDS, VOCABULARY, (words - 4 * row,), generator=g).tolist()
            ids.append(
                [BOS, *text[:3], *([START, *[IMAGE] * self.places, END] if self.places else []), *text, *text[:5]]
            )
        width = max(map(len, ids))
        padded = torch.tensor([[PAD] * (width - len(x)) + x for x in ids])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids])
        return self.text(padded, mask) | (self.pixels(rows, g) if self.pixels else {})

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a prompt's tokens [B, L]."""
        types = {"mm_token_type_ids": (ids == IMAGE).long()} if self.typed else {}
        return {"input_ids": ids, "attention_mask": mask, **types}


def _kimi_pixels(rows: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(8 * rows, 3, 4, 4, generator=g), "image_grid_thw": torch.tensor([[1, 4, 2]] * rows)
    }  # fmt: skip


def _qwen_pixels(rows: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(24 * rows, 96, generator=g), "image_grid_thw": torch.tensor([[1, 4, 6]] * rows)
    }  # fmt: skip


TARGETS = {
    "kimi_k25": MtpTarget(kimi_k25, _kimi_pixels, 2),
    "glm4_moe": MtpTarget(glm4_moe),
    "step3p7": MtpTarget(step3p7, lambda n, g: {"pixel_values": torch.randn(n, 3, 32, 32, generator=g)}, 4),
    "qwen3_5": MtpTarget(qwen3_5, _qwen_pixels, 6, True),
    "qwen3_5_moe": MtpTarget(qwen3_5_moe, _qwen_pixels, 6, True),
}


def layers_of(model: PreTrainedModel, count: int, seed: int = 7) -> MtpModel:
    """Random multi-token-prediction layers for a model."""
    torch.manual_seed(seed)
    with declared(model):
        made = MtpModel(model, count).eval()
    with torch.no_grad():
        for weight in made.layers.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.12)
        for name, buffer in made.named_buffers():
            if "bias" in name:
                buffer.zero_()
    return made
