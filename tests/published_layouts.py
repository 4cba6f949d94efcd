"""The layouts of published heads, from the authors' classes: names and shapes of all tensors, and the config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

V, VD, H, I, HEADS, KV, D, RANK = 64, 56, 32, 64, 4, 2, 8, 6  # noqa: E741
FIRST = 6  # the first id of a draft vocabulary
Shapes = dict[str, tuple[int, ...]]
SIZES: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": I, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "vocab_size": V, "hidden_act": "silu",
}  # fmt: skip
BLOCK = SIZES | {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "head_dim": D,
    "rope_theta": 1e6,
    "num_target_layers": 8,
}


def layer(prefix: str, width: int = H, kv: int = KV, bias: bool = False, norms: tuple[str, ...] = ()) -> Shapes:
    """One decoder layer; norms: besides that of its MLP."""
    out = {"q": HEADS * D, "k": kv * D, "v": kv * D}
    shapes: Shapes = {f"self_attn.{n}_proj.weight": (rows, width) for n, rows in out.items()}
    shapes |= {f"self_attn.{n}_proj.bias": (rows,) for n, rows in out.items()} if bias else {}
    shapes |= {"self_attn.o_proj.weight": (H, HEADS * D), "post_attention_layernorm.weight": (H,)}
    shapes |= {"mlp.gate_proj.weight": (I, H), "mlp.up_proj.weight": (I, H), "mlp.down_proj.weight": (H, I)}
    shapes |= {f"{n}.weight": (D,) if "self_attn" in n else (H,) for n in norms}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


EAGLE: Shapes = {"embed_tokens.weight": (V, H), "fc.weight": (H, 2 * H), "fc.bias": (H,)}
PAIR = ("input_layernorm", "hidden_norm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
TOP: Shapes = {"fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (VD, H), "d2t": (VD,), "t2d": (V,)}
INJECTED: Shapes = {
    "fc.weight": (H, 3 * H), "hidden_norm.weight": (H,), "norm.weight": (H,),
    **layer("layers.0", norms=("input_layernorm", *HEAD_NORMS)),
    **layer("layers.1", norms=("input_layernorm", *HEAD_NORMS)),
}  # fmt: skip


def markov(rows: int = V, confidence: int = H + RANK) -> Shapes:
    return {
        "markov_head.markov_w1.weight": (V, RANK), "markov_head.markov_w2.weight": (rows, RANK),
        "confidence_head.proj.weight": (1, confidence), "confidence_head.proj.bias": (1,),
    }  # fmt: skip


def speculators(kind: str, depth: int = 5, **own: Any) -> dict[str, Any]:
    model = own.pop("model_type", "qwen3")
    return {
        "architectures": ["x"], "speculators_model_type": kind, "draft_vocab_size": VD, **own,
        "transformer_layer_config": {
            **SIZES, "model_type": model, "head_dim": D, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "num_hidden_layers": 1 if kind == "eagle3" else 2,
        },
        "speculators_config": {
            "algorithm": kind, "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": depth}]
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """format: its name here. family: of a tiny target that it drafts for."""

    name: str
    format: str
    config: dict[str, Any]
    shapes: Shapes
    family: str = "llava"

    def tensors(self) -> dict[str, Tensor]:
        """Random weights, and a draft vocabulary of the ids from `FIRST`."""
        g = torch.Generator().manual_seed(0)
        out = {n: torch.randn(s, generator=g) * 0.1 + float("norm" in n) for n, s in self.shapes.items()}
        if "d2t" in out:
            rows = len(out["d2t"])
            out["d2t"] = torch.full((rows,), FIRST)
            out["t2d"] = torch.arange(V).ge(FIRST) & torch.arange(V).lt(FIRST + rows)
        return out

    def write(
        self,
        folder: Path,
        change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
        pickled: bool = False,
        **config: Any,
    ) -> Path:
        """Writes the head, after `change` of its tensors and with other values in its config."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.tensors()
        change(tensors)
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config | config))
        return folder


MROPE = {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}}
DSPARK = {"markov_rank": RANK, "markov_head_type": "vanilla", "enable_confidence_head": True}
LAYOUTS = [
    Layout("eagle2", "eagle2", SIZES | {"model_type": "llama"}, EAGLE | layer("layers.0")),
    Layout("msd-llava", "msd-llava", SIZES | {"model_type": "llava"}, EAGLE | layer("layers.0")),
    Layout(
        "msd-qwen2-vl", "msd-qwen2-vl",
        SIZES | {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        EAGLE | layer("layers.0", bias=True, norms=("input_layernorm",)), "qwen2_vl",
    ),
    *(
        Layout(
            name, "vispec", SIZES | {"model_type": family, "num_key_value_heads": HEADS, "qkv_bias": bias},
            EAGLE | layer("layers.0", kv=HEADS, bias=bias) | {"imadpt.q": (2, HEADS, H // HEADS)}
            | {f"imadpt.{n}_proj.weight": (H, H) for n in "kvo"}
            | ({f"imadpt.{n}_proj.bias": (H,) for n in "kv"} if bias else {})
            | {"img_fc.weight": (H, 2 * H), "img_fc.bias": (H,)}, family,
        )
        for name, family, bias in (("vispec-llava", "llava", False), ("vispec-qwen2.5-vl", "qwen2_5_vl", True))
    ),
    Layout(
        "eagle3", "eagle3", SIZES | {"draft_vocab_size": VD, "architectures": ["LlamaForCausalLM"]},
        TOP | layer("midlayer", 2 * H, norms=PAIR),
    ),
    Layout(
        "specforge", "specforge",
        SIZES | {
            "draft_vocab_size": VD, "architectures": ["LlamaForCausalLMEagle3"], "fc_norm": True, "norm_output": False,
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 2, 6]},
        },
        TOP | layer("midlayer", 2 * H, norms=PAIR) | {f"fc_norm.{i}.weight": (H,) for i in range(3)},
    ),
    Layout(
        "angelslim", "angelslim",
        SIZES | {"draft_vocab_size": VD, "architectures": ["Eagle3LlamaForCausalLM"], "head_dim": D} | MROPE,
        TOP | layer("midlayer", 2 * H, norms=PAIR), "qwen3_vl",
    ),
    Layout(
        "speculators-llama", "speculators",
        speculators("eagle3", model_type="llama", norm_before_residual=True, norm_before_fc=True),
        TOP | layer("layers.0", 2 * H, norms=PAIR) | {"embed_tokens.weight": (V, H), "input_norm.weight": (3 * H,)},
    ),
    Layout(
        "speculators-qwen3", "speculators",
        speculators("eagle3", eagle_aux_hidden_state_layer_ids=[2, 4, 7], fc_norm=True, norm_output=True),
        TOP | layer("layers.0", 2 * H, norms=(*PAIR, *HEAD_NORMS)) | {f"fc_norm.{i}.weight": (H,) for i in range(3)},
        "qwen3_vl",
    ),
    Layout(
        "dflash", "dflash",
        BLOCK | {
            "architectures": ["DFlashDraftModel"], "block_size": 6,
            "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 3, 5]},
        },
        INJECTED, "qwen3_vl",
    ),
    Layout(
        "dspark-deepspec", "dspark",
        BLOCK | DSPARK | {
            "architectures": ["Qwen3DSparkModel"], "block_size": 6, "confidence_head_with_markov": True,
            "mask_token_id": 5, "target_layer_ids": [1, 3, 5],
        },
        INJECTED | markov() | {"embed_tokens.weight": (V, H), "lm_head.weight": (V, H)},
    ),
    Layout(
        "dspark-specforge", "dspark",
        BLOCK | {
            "architectures": ["DSparkDraftModel"], "block_size": 6,
            "dflash_config": DSPARK | {"mask_token_id": 5, "target_layer_ids": [1, 3, 5], "markov_head_type": "rnn"},
        },
        INJECTED | markov(confidence=H)
        | {"markov_head.joint_proj.weight": (3 * RANK, H + 2 * RANK), "markov_head.joint_proj.bias": (3 * RANK,)},
    ),
    Layout(
        "speculators-dflash", "speculators-dflash",
        speculators("dflash", block_size=6, aux_hidden_state_layer_ids=[2, 4, 6], mask_token_id=5),
        INJECTED | {"embed_tokens.weight": (V, H), "lm_head.weight": (VD, H), "d2t": (VD,), "t2d": (V,)},
    ),
    Layout(
        "speculators-dspark", "speculators-dspark",
        speculators(
            "dspark", block_size=6, aux_hidden_state_layer_ids=[2, 4, 6], mask_token_id=5, markov_rank=RANK,
            markov_head_type="gated",
        ),
        INJECTED | markov(VD)
        | {"markov_head.gate_proj.weight": (RANK, H + RANK), "markov_head.gate_proj.bias": (RANK,)}
        | {"embed_tokens.weight": (V, H), "lm_head.weight": (VD, H), "d2t": (VD,), "t2d": (V,)},
    ),
]  # fmt: skip
