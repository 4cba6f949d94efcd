"""Small random targets whose head dimension vLLM's attention on CPUs has (32), with processors that it loads.

Images have the size that the processor would give them, so that no resizing, which differs between libraries, is part
of a comparison. A head's output layer has rows of the target's, so that some of its drafts are accepted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from msd import SpeculativeVLM
from msd.formats.format import OURS

SPECIAL = ["<pad>", "<s>", "</s>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
BOS, EOS, IMAGE, START, END, VIDEO = 1, 2, 3, 4, 5, 6
VOCABULARY = len(SPECIAL) + 256
H, LAYERS, DRAFT_VOCABULARY = 128, 8, 64
FITS = 4  # each adds the levels that the one before made reachable
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": H, "intermediate_size": 2 * H, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
PIXELS = {"do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Target:
    """A saved model, its prompts for our engine, and the same for vLLM. engine: arguments of `vllm.LLM`."""

    model: Any
    folder: Path
    inputs: list[dict[str, torch.Tensor]]
    prompts: list[dict[str, Any]]
    engine: dict[str, Any]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS],
        extra_special_tokens={
            "image_token": SPECIAL[IMAGE], "video_token": SPECIAL[VIDEO], "vision_bos_token": SPECIAL[START],
            "vision_eos_token": SPECIAL[END],
        },
    )  # fmt: skip


def words(seed: int, count: int) -> list[int]:
    return torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def photos(folder: Path, count: int, side: int) -> list[Path]:
    """Noisy images written to `folder`."""
    random = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
    return files


def made(kind: str, folder: Path, sharpness: float, strength: float, **config: Any) -> Any:
    """A seeded model, saved; its weights are larger than at the start of training, so that pictures matter."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, tie_word_embeddings=False, **config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
                weight.mul_(strength)
        model.lm_head.weight.mul_(sharpness)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, 0
    model.save_pretrained(folder)
    return model.eval()


def llava(folder: Path, count: int = 4) -> Target:
    """LLaVA-1.5 in small: 4 tokens per 16x16 image, and a real CLIP tower."""
    vision: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    model = made(
        "llava", folder, 10.0, 4.0, text_config=TEXT | {"model_type": "llama"}, image_token_index=IMAGE,
        image_seq_length=4, vision_feature_layer=-2, vision_feature_select_strategy="default",
        vision_config=vision | {"model_type": "clip_vision_model"},
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    pixels = CLIPImageProcessor(size=size, crop_size=size, **PIXELS)
    LlavaProcessor(
        pixels, tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token=SPECIAL[IMAGE],
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    file = folder / "model.safetensors"  # vLLM 0.32.0 knows the tower's names of earlier releases of transformers
    tower = "vision_tower."
    renamed = {n.replace(tower, tower + "vision_model."): t for n, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    prompts, inputs = [], []
    for i, file in enumerate(photos(folder, count, 16)):
        head, tail = [BOS, *words(i, 4)], words(100 + i, 6)
        prompts.append({"ids": [*head, IMAGE, *tail], "image": str(file)})
        values = pixels(Image.open(file), return_tensors="pt")["pixel_values"]
        inputs.append(_inputs([*head, *[IMAGE] * 4, *tail], pixel_values=values))
    return Target(model, folder, inputs, prompts, {})


def qwen3_vl(folder: Path, count: int = 4) -> Target:
    """Qwen3-VL in small: 4 tokens per 64x64 image, M-RoPE, and deepstack features."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    model = made(
        "qwen3_vl", folder, 10.0, 4.0, text_config=TEXT | {"model_type": "qwen3_vl_text", "rope_parameters": rope},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        vision_config={
            "depth": 2, "num_heads": 2, "hidden_size": 64, "out_hidden_size": H, "intermediate_size": 128,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    )  # fmt: skip
    pixels = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512}, patch_size=16, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    tokenizer().save_pretrained(folder)
    shared = {"size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}, "patch_size": 16, "merge_size": 2}
    shared |= {"temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kinds = {"processor_class": "Qwen3VLProcessor"}
    image = shared | kinds | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = shared | kinds | {"video_processor_type": "Qwen3VLVideoProcessor"}
    for name, config in (("preprocessor", image), ("video_preprocessor", video)):
        (folder / f"{name}_config.json").write_text(json.dumps(config))
    prompts, inputs = [], []
    for i, file in enumerate(photos(folder, count, 64)):
        head, tail = [BOS, *words(i, 4), START], [END, *words(100 + i, 6)]
        prompts.append({"ids": [*head, IMAGE, *tail], "image": str(file)})
        found = pixels(Image.open(file), return_tensors="pt")
        ids = [*head, *[IMAGE] * 4, *tail]
        types = torch.tensor([[int(token == IMAGE) for token in ids]])
        inputs.append(_inputs(ids, **found, mm_token_type_ids=types))
    return Target(model, folder, inputs, prompts, {"limit_mm_per_prompt": {"image": 1, "video": 0}})


def _inputs(ids: list[int], **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **tensors}


def random_head(folder: Path, model: Any, answers: Sequence[Sequence[int]], columns: bool, seed: int = 0) -> Path:
    """A random EAGLE-3 head in the layout of speculators, over the ids that the answers have most often.

    columns: whether its positions count columns, also under M-RoPE.
    """
    g = torch.Generator().manual_seed(seed)
    often = [token for token, _ in Counter(t for answer in answers for t in answer).most_common(DRAFT_VOCABULARY)]
    others = [token for token in range(len(SPECIAL), VOCABULARY) if token not in often]
    ids = torch.tensor(sorted([*often, *others][:DRAFT_VOCABULARY]))

    def weight(rows: int, columns: int, scale: float = 0.1) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * scale

    mark = torch.zeros(VOCABULARY, dtype=torch.bool)
    mark[ids] = True
    tensors = {
        "d2t": ids - torch.arange(len(ids)), "t2d": mark, "norm.weight": torch.ones(H),
        "fc.weight": torch.cat([weight(H, 2 * H, 0.02), torch.eye(H)], 1), "lm_head.weight": model.lm_head.weight[ids],
        "layers.0.self_attn.q_proj.weight": weight(H, 2 * H), "layers.0.self_attn.k_proj.weight": weight(H // 2, 2 * H),
        "layers.0.self_attn.v_proj.weight": weight(H // 2, 2 * H), "layers.0.self_attn.o_proj.weight": weight(H, H),
        "layers.0.mlp.gate_proj.weight": weight(2 * H, H), "layers.0.mlp.up_proj.weight": weight(2 * H, H),
        "layers.0.mlp.down_proj.weight": weight(H, 2 * H),
    }  # fmt: skip
    tensors |= {
        f"layers.0.{n}.weight": torch.ones(H) for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    }
    layer = TEXT | {"model_type": "llama", "num_hidden_layers": 1, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": len(ids),
        "target_hidden_size": H, "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False,
        "norm_output": False, "eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3],
        "transformer_layer_config": layer, "dtype": "float32", OURS: {"placeholders": True, "columns": columns},
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fit(
    engine: SpeculativeVLM, target: Target, answers: Sequence[Sequence[int]], folder: Path, rounds: int = 4
) -> None:
    """Fits the output layer of the head in `folder`, which `engine` drafts with, to the answers by least squares.

    A draft of level k of a step is right if it is token first + k of the answer; its state counts if all drafts above
    it were right. Such a head answers these prompts alone, and only where it reads the states and positions it was
    fitted to.
    """
    network = engine.drafter.network  # type: ignore[attr-defined]
    places = {token: row for row, token in enumerate(network.ids.tolist())}
    states: list[torch.Tensor] = []
    hook = network.lm_head.register_forward_pre_hook(lambda module, values: states.append(values[0].reshape(-1)))
    seen: dict[tuple[int, int, int], torch.Tensor] = {}
    for _ in range(FITS):
        for number, (inputs, answer) in enumerate(zip(target.inputs, answers, strict=True)):
            states.clear()
            result = engine.generate(**inputs, max_new_tokens=len(answer), do_sample=False)
            drafted = iter(states)
            for step in result.statistics.steps:
                for level in range(step.levels):
                    state = next(drafted)
                    if level <= step.accepted and answer[step.first + level] in places:
                        seen[number, step.first, level] = state
        x = torch.stack(list(seen.values())).double()
        y = torch.zeros(len(x), len(places), dtype=torch.double)
        for row, (number, first, level) in enumerate(seen):
            y[row, places[answers[number][first + level]]] = 10.0
        solved = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=torch.double), x.T @ y)
        network.lm_head.weight.data = solved.T.float().contiguous()
    hook.remove()
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": network.lm_head.weight.detach()}, file)
