"""`SpeculativeConfig`, the options of speculation, and the check of `generate()`'s own options."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from msd.drafters.algorithms.draft_model import views
from msd.errors import UserError


class SpeculativeConfig(BaseModel):
    """The options of speculation.

    method: a name of `msd.drafters.methods()`; by default the one that ships for the target (`msd.drafters.default`).
    draft_model: a folder or hub id of a smaller model that drafts (method `draft-model`); draft_sees: what it sees of
    the prompt's images, "image", "caption", "nothing", or several with commas (by default the images if it takes any).
    verifier: a name of `msd.verify.policies()`.
    thresholds: modality name -> θ of `threshold`, or the initial θ of `budget`. Without them, `budget` uses the
    thresholds calibrated for the drafter, or else the registry's.
    epsilon: the divergence budget of `budget`, mean total variation per emitted token (0: lossless).
    backend: how the target's passes are computed: "plain" (the model's own code), "fused", "measure" (the faster of
    the two on this machine), or "bf16" (fused, with products rounded to bfloat16: lossy).
    label: whether results contain the modality that the drafter's router predicts for each token.
    foresight: whether the drafts of a request that samples may depend on the noise of its coming draws
    (`msd.core.foresight`). It applies only to a lossless verifier and drafts that are not sampled.
    adaptive: whether the size of a step's draft follows the measured costs of the target's passes, down to none if
    drafting is slower. Without it, and always with sampled drafts, a lossy verifier or a lossy backend, the draft is
    as large as allowed.
    frozen_weights: the caller's promise that the content of the target's weights does not change as long as the engine
    exists. Without it all weights are read before each request, since a change of `weight.data` leaves no other trace;
    on a CPU this takes about as long as a plain pass. Other changes of the model are seen in any case.
    calibrate: whether a drafter that nobody calibrated (`mtp`, an assistant, a draft model, a published head) is
    calibrated by what the target accepts of its drafts, and this is kept in the user's cache directory. Only if
    `adaptive` applies.
    nodes, depth, width: the largest draft tree: drafted nodes; levels; and children of a node, as well as expanded
    nodes of a subtree per level (1: a chain). The method's own limits hold too; no method drafts more than 8 levels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = None
    draft_model: str | None = None
    draft_sees: str | None = None
    verifier: str = "lossless"
    thresholds: dict[str, float] = Field(default_factory=dict)
    epsilon: float = 0.0
    backend: str = "measure"
    label: bool = False
    foresight: bool = True
    adaptive: bool = True
    frozen_weights: bool = False
    calibrate: bool = True
    nodes: int = Field(default=8, ge=1)
    depth: int = Field(default=8, ge=1)
    width: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _draft_model_fits(self) -> SpeculativeConfig:
        """UserError for a draft model with another method, and for `draft_sees` without a draft model."""
        check_draft_model(self.draft_model, self.draft_sees, self.method)
        return self


def check_draft_model(model: str | None, sees: str | None, method: str | None) -> None:
    """UserError for a draft model with another method, for the method without one, and for `sees` without one."""
    chosen = method is not None and "draft-model" in method.split(",")
    if model is None and sees is not None:
        raise UserError(f"draft_sees '{sees}' is for a draft model; name one with draft_model (--draft-model ID)")
    if sees is not None:
        views(sees)
    if model is None and chosen:
        raise UserError("method 'draft-model' needs a model; name one with draft_model (--draft-model ID)")
    if model is not None and method is not None and not chosen:
        raise UserError(f"draft model '{model}' is for method 'draft-model', not '{method}'; leave out one of the two")


CACHES = (None, "dynamic", "static")  # our cache is both: it grows with the answer, in preallocated memory
# options that select another decoding method, or another kind of input
_DECODING = (
    "use_mtp", "assistant_early_exit", "prompt_lookup_num_tokens", "dola_layers", "penalty_alpha", "force_words_ids",
    "constraints", "diversity_penalty", "speculation_type", "is_assistant",
)  # fmt: skip
_ARGUMENTS = {
    "assistant_model": "selects another decoding method; choose one of msd's with drafter=… instead",
    "assistant_tokenizer": "belongs to assistant_model, another decoding method; choose one of msd's with drafter=…",
    "custom_generate": "selects another decoding method; choose one of msd's with drafter=… instead",
    "inputs_embeds": "cannot be drafted from: drafts read token ids; give input_ids",
    "past_key_values": (
        "holds keys and values but not the hidden states that drafts read; give the whole prompt with its images, or "
        "continue a conversation with chat() or past=Past()"
    ),
    "synced_gpus": "belongs to models that are sharded over processes; speculative decoding runs in one",
}


def checked(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """Merges the options of a generation as `model.generate(**kwargs)` does.

    UserError for the first option that speculative decoding does not support.
    """
    for name, why in _ARGUMENTS.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(f"{name} {why}")
    if "generate" in vars(model):
        raise UserError("this model has its own generate(), another decoding method; load it without that code")
    config, _ = model._prepare_generation_config(**{"generation_config": None, **kwargs})
    if config.num_beams and config.num_beams > 1:
        raise UserError(f"num_beams={config.num_beams}: speculative decoding follows one beam; use num_beams=1")
    for name in _DECODING:
        value = getattr(config, name, None)
        if value not in (None, False, 0):
            raise UserError(
                f"{name}={value!r} selects another decoding method; choose one of msd's with drafter=… instead"
            )
    if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"the options select '{mode.value}'; speculative decoding does greedy search and sampling")
    _check_cache(config)
    if config.token_healing:
        raise UserError("token_healing changes the prompt, including its placeholders; heal the prompt before the call")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise UserError(
                f"{name} is not supported: one pass scores many drafts; ask for output_scores or output_logits"
            )
    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if isinstance(value, float):
            raise UserError(f"{name}={value} is a float, not a number of tokens; give an integer")
    return config


def _check_cache(config: GenerationConfig) -> None:
    """Raises UserError for options of the key/value cache that are not supported."""
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
            f"prefill_chunk_size={config.prefill_chunk_size}: msd reads a prompt in one pass; leave the option out"
        )
