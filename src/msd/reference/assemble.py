"""Assembles a language model, a vision encoder and the trained parts into a standard LLaVA checkpoint.

`folder.py` finds the input files and decides when and where to build.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from msd.reference.encoder import EfficientNetLiteConfig
from msd.reference.folder import Sources

BUILDER_VERSION = 2  # increase it when the same inputs would give another checkpoint
IMAGE_TOKEN = "<image>"
SPARE_TOKEN = "<empty_output>"  # a special token of SmolLM2's code data; the image placeholder replaces it
LOW_RANK_SCALE = 2.0
MAX_LENGTH = 8192  # tokens, the context SmolLM2 was trained for

# A turn lists its images, one per line, then its text. There is no default system turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] not in ('image', 'image_url') -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('this model reads text and images, not ' + part['type']) -}}
{%- endif -%}
{{- part['text'] if loop.first else '\\n' + part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def load_language_model(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads SmolLM2-135M-Instruct as published, float32, with its tokenizer and chat template."""
    folder, name = str(gguf.parent), gguf.name
    with _quiet():
        model = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    del model.config.quantization_config  # the loaded weights are plain float32
    model.config.name_or_path = "SmolLM2-135M-Instruct"  # instead of a local folder
    return model, tokenizer


def add_low_rank(state: dict[str, Tensor], updates: Mapping[str, Tensor]) -> None:
    """Adds W <- W + 2·B·A in place for each `lm.NAME.A` [r, in], `lm.NAME.B` [out, r] and `NAME.weight` [out, in].

    KeyError if an update lacks its other factor, or there is no such weight.
    """
    for name in (n for n in updates if re.fullmatch(r"lm\..+\.A", n)):
        module = name.removeprefix("lm.").removesuffix(".A")
        A, B = updates[name].float(), updates[f"lm.{module}.B"].float()
        state[f"{module}.weight"] = state[f"{module}.weight"] + LOW_RANK_SCALE * (B @ A)


def build_model(
    language_model: LlamaForCausalLM,
    vision_config: EfficientNetLiteConfig,
    encoder: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    image_token_id: int,
) -> LlavaForConditionalGeneration:
    """Builds the whole model in float32.

    Args:
        language_model: with tied embeddings; its weights are not changed.
        vision_config: of the tower.
        encoder: the tower's convolutions, any float type.
        trained: `tower.norm.{weight,bias}`, `tower.pos` [cells, C], `tower.colour` [C, 48],
            `linear_{1,2}.{weight,bias}` (the projector) and low-rank updates as in `add_low_rank`.
        image_token_id: id of the image placeholder.

    Raises:
        RuntimeError: a tensor is missing, superfluous or of the wrong shape.
    """
    text = language_model.state_dict()
    add_low_rank(text, trained)
    state = {f"model.language_model.{n.removeprefix('model.')}": w for n, w in text.items() if n != "lm_head.weight"}
    state["lm_head.weight"] = text["model.embed_tokens.weight"]
    state |= {f"model.vision_tower.{name}": weight for name, weight in encoder.items()}
    state["model.vision_tower.position"] = trained["tower.pos"]
    state["model.vision_tower.colour.weight"] = trained["tower.colour"]
    for name, weight in trained.items():
        if name.startswith("tower.norm."):
            state[f"model.vision_tower.{name.removeprefix('tower.')}"] = weight
        elif name.startswith("linear_"):
            state[f"model.multi_modal_projector.{name}"] = weight
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config,
            text_config=language_model.config,
            image_token_index=image_token_id,
            image_seq_length=vision_config.num_cells,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    ids = {f"{name}_token_id": getattr(language_model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def build_processor(tokenizer: PreTrainedTokenizerBase, vision_config: EfficientNetLiteConfig) -> LlavaProcessor:
    """Builds the processor: an image placeholder, the chat template, (x - 127) / 128 at the tower's size, no cropping.

    The vocabulary keeps its size: the placeholder replaces `SPARE_TOKEN`. ValueError if the tokenizer has none.
    """
    from transformers import CLIPImageProcessor  # imported here: without torchvision the import prints a warning

    if SPARE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no {SPARE_TOKEN} to turn into {IMAGE_TOKEN}")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"][IMAGE_TOKEN] = data["model"]["vocab"].pop(SPARE_TOKEN)
    for token in data["added_tokens"]:
        if token["content"] == SPARE_TOKEN:
            token["content"] = IMAGE_TOKEN
    side = {"height": vision_config.image_size, "width": vision_config.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=side,
            crop_size=side,  # serving engines compute the number of image tokens from it
            do_center_crop=False,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(data)),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            unk_token=tokenizer.unk_token,
            pad_token=tokenizer.pad_token,
            extra_special_tokens={"image_token": IMAGE_TOKEN},
            model_max_length=MAX_LENGTH,
            padding_side="left",
        ),
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(sources: Sources, destination: Path) -> None:
    """Writes the reference checkpoint into the folder `destination`: about 560 MB, about 20 seconds."""
    language_model, tokenizer = load_language_model(sources.gguf)
    vision_config = EfficientNetLiteConfig()
    with _quiet():
        processor = build_processor(tokenizer, vision_config)
        image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        encoder, trained = load_file(sources.encoder), load_file(sources.vlm)
        model = build_model(language_model, vision_config, encoder, trained, image_token_id)
        model.save_pretrained(destination)
        processor.save_pretrained(destination)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses progress bars and messages of `transformers`; errors still raise."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
