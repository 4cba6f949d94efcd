"""SpeculativeConfig: what a user may set about speculation."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from msd.errors import UserError


class SpeculativeConfig(BaseModel):
    """How to speculate.

    method: a name of `msd.drafters.methods()`; without one, what ships for the target (`msd.drafters.default`).
    verifier: a name of `msd.verify.policies()`.
    thresholds: modality name -> θ of `threshold`, or the θ that `budget` begins with; where it has none, `budget` takes
    those calibrated for the drafter, if there are any, and else the registry's.
    epsilon: mean total variation per emitted token that `budget` may spend (0: lossless).
    backend: how the target's passes are computed: "plain", by the model's own code; "fused"; "measure", the faster of
    them here; or "bf16", fused with products rounded to bfloat16, whose answers are not always the model's own (lossy).
    label: whether results tell each token's modality, as the drafter's router predicts it.
    adaptive: whether a step drafts what pays by the measured costs of the target's passes, and nothing where drafting
    loses; otherwise, and always where drafts are sampled or verifier or backend are lossy, it drafts as much as it may.
    nodes, depth, width: the largest draft tree, in drafted nodes, in levels, and in children of a
    node and nodes of a subtree that go on per level (1: a chain).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = None
    verifier: str = "lossless"
    thresholds: dict[str, float] = Field(default_factory=dict)
    epsilon: float = 0.0
    backend: str = "measure"
    label: bool = False
    adaptive: bool = True
    nodes: int = Field(default=8, ge=1)
    depth: int = Field(default=6, ge=1)
    width: int | None = Field(default=None, ge=1)


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
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise UserError(
                f"{name} is not supported: one pass scores many drafts; ask for output_scores or output_logits"
            )
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
