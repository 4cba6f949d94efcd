"""Which options of `generate()` speculative decoding honours, and one line for each that it cannot.

An option may come by three doors: as a keyword, in a `GenerationConfig`, or in the model's own generation config. The
library merges them, and it is asked which way of decoding they mean.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from msd.errors import UserError

CACHES = (None, "dynamic", "static")  # what our cache is: it grows with the answer, in memory reserved beforehand
# options that mean another way of decoding, or another kind of input, once they are set
_DECODING = (
    "use_mtp", "assistant_early_exit", "prompt_lookup_num_tokens", "dola_layers", "penalty_alpha", "force_words_ids",
    "constraints", "diversity_penalty", "speculation_type", "is_assistant",
)  # fmt: skip
_ARGUMENTS = {
    "assistant_model": "asks for another way of decoding; choose msd's with drafter=… instead",
    "assistant_tokenizer": "belongs to assistant_model, which is another way of decoding; choose msd's with drafter=…",
    "custom_generate": "asks for another way of decoding; choose msd's with drafter=… instead",
    "inputs_embeds": "cannot be drafted from: drafts read token ids; give input_ids",
    "past_key_values": (
        "holds keys and values but not the hidden states that drafts read; give the whole prompt with its images, or "
        "continue a conversation with chat() or past=Past()"
    ),
    "synced_gpus": "belongs to models that are sharded over processes; speculative decoding runs in one",
}


def checked(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """The options of a generation, merged from all doors; kwargs: as for `model.generate()`.

    UserError for the first one that speculative decoding cannot honour.
    """
    for name, why in _ARGUMENTS.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(f"{name} {why}")
    if "generate" in vars(model):
        raise UserError("this model brings a generate() of its own, another way of decoding; load it without that code")
    config, _ = model._prepare_generation_config(**{"generation_config": None, **kwargs})
    if config.num_beams and config.num_beams > 1:
        raise UserError(f"num_beams={config.num_beams}: speculative decoding follows one beam; use num_beams=1")
    for name in _DECODING:
        value = getattr(config, name, None)
        if value not in (None, False, 0):
            raise UserError(f"{name}={value!r} asks for another way of decoding; choose msd's with drafter=… instead")
    if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"the options ask for '{mode.value}'; speculative decoding does greedy search and sampling")
    _check_cache(config)
    if config.token_healing:
        raise UserError("token_healing rewrites the prompt, placeholders and all; heal the prompt before you give it")
    if config.return_dict_in_generate:
        raise UserError("return_dict_in_generate is not supported; the result's statistics and tokens take its place")
    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if isinstance(value, float):
            raise UserError(f"{name}={value} is a float, no number of tokens; give an integer")
    return config


def _check_cache(config: GenerationConfig) -> None:
    """What is asked of the key/value cache."""
    if not config.use_cache:
        raise UserError(
            f"use_cache={config.use_cache}: drafts are scored against a key/value cache; leave it out or set it to True"
        )
    if config.cache_implementation not in CACHES:
        raise UserError(
            f"cache_implementation='{config.cache_implementation}' is not supported; the cache is in full precision on "
            "the model's device: leave the option out"
        )
    if config.prefill_chunk_size is not None:
        raise UserError(
            f"prefill_chunk_size={config.prefill_chunk_size}: a prompt is read in one pass here; leave the option out"
        )
