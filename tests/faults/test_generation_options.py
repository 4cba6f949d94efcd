"""Each option of `generate()` is supported or raises UserError, as a keyword or in either config."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import tiny
import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.result import Result

INPUTS = tiny.llava_inputs(1)
# an option that selects another decoding method, and what the message names
OTHER: dict[str, Any] = {
    "use_mtp": True,
    "assistant_early_exit": 2,
    "prompt_lookup_num_tokens": 3,
    "dola_layers": "high",
    "penalty_alpha": 0.6,
    "force_words_ids": [[5]],
    "num_beams": 2,
    "token_healing": True,
    "use_cache": False,
    "prefill_chunk_size": 8,
    "cache_implementation": "quantized",
}


@cache
def engine() -> SpeculativeVLM:
    return SpeculativeVLM(tiny.llava(), None, drafter="prompt-lookup")


def refused(vlm: SpeculativeVLM, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        vlm.generate(**INPUTS, max_new_tokens=4, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", OTHER)
def test_as_a_keyword(name: str) -> None:
    assert name in refused(engine(), **{name: OTHER[name]})


@pytest.mark.parametrize("name", OTHER)
def test_in_a_generation_config(name: str) -> None:
    more = {"num_beams": 2} if name == "force_words_ids" else {}  # without it the library itself raises an error
    config = GenerationConfig(max_new_tokens=4, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    setattr(config, name, OTHER[name])
    for key, value in more.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=name if not more else "num_beams"):
        engine().generate(**INPUTS, generation_config=config)


@pytest.mark.parametrize("name", OTHER)
def test_in_the_own_config_of_the_model(name: str) -> None:
    model = tiny.llava()
    setattr(model.generation_config, name, OTHER[name])
    assert name in refused(SpeculativeVLM(model, None, drafter="ar"))


@pytest.mark.parametrize("kind", ["paged", "offloaded", "offloaded_static", "sliding_window"])
def test_caches_of_other_kinds(kind: str) -> None:
    for options in ({"cache_implementation": kind}, {"generation_config": GenerationConfig(cache_implementation=kind)}):
        if kind == "sliding_window" and "generation_config" in options:
            continue
        assert kind in refused(engine(), **options)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_that_are_supported(kind: str) -> None:
    wanted = engine().generate(**INPUTS, max_new_tokens=4)
    result = engine().generate(**INPUTS, max_new_tokens=4, cache_implementation=kind)
    assert isinstance(wanted, Result) and isinstance(result, Result)
    assert result.tokens == wanted.tokens


@pytest.mark.parametrize(
    "name",
    ["past_key_values", "inputs_embeds", "assistant_model", "assistant_tokenizer", "custom_generate", "synced_gpus"],
)
def test_arguments_that_are_not_options(name: str) -> None:
    values = {"past_key_values": DynamicCache(), "inputs_embeds": torch.zeros(1, 4, 32), "synced_gpus": True}
    assert name in refused(engine(), **{name: values.get(name, object())})


def test_a_cache_with_the_image_is_not_silently_dropped() -> None:
    model = engine().model
    cache_of_user = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**INPUTS, past_key_values=cache_of_user, use_cache=True)
    words = {k: v for k, v in INPUTS.items() if k != "pixel_values"}
    with pytest.raises(UserError, match="past_key_values"):
        engine().generate(**words, past_key_values=cache_of_user, max_new_tokens=4)


def test_a_custom_generate_of_the_model_is_refused() -> None:
    model = tiny.llava()
    vlm = SpeculativeVLM(model, None, drafter="ar")
    model.generate = lambda *args, **kwargs: torch.zeros(1, 1)  # as `trust_remote_code` installs one
    assert "generate()" in refused(vlm)


def test_options_that_the_library_ignores_are_accepted() -> None:
    """Options of assistants, beams and outputs have no effect without the option that enables these."""
    wanted = engine().generate(**INPUTS, max_new_tokens=6)
    idle = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.2, "max_matching_ngram_size": 2}
    result = engine().generate(**INPUTS, max_new_tokens=6, output_scores=True, num_beams=1, length_penalty=1.0, **idle)
    assert isinstance(wanted, Result) and isinstance(result, Result)
    assert result.tokens == wanted.tokens


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
@pytest.mark.parametrize("more", [0.0, 0.5])
def test_lengths_that_are_not_integers(name: str, more: float) -> None:
    with pytest.raises(UserError, match=f"{name}=.*integer"):
        engine().generate(**INPUTS, **{name: INPUTS["input_ids"].shape[1] + 4 + more})


def test_use_cache_of_none() -> None:
    """As in `generate()`, None is False as a keyword, and the default in a config."""
    assert "use_cache=None" in refused(engine(), use_cache=None)
    config = GenerationConfig(max_new_tokens=4, use_cache=None, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    assert engine().generate(**INPUTS, generation_config=config).tokens


@pytest.mark.parametrize("own", [None, "says"])
@pytest.mark.parametrize("given", [{}, {"stop_strings": None}, {"stop_strings": "again"}, {"stop_strings": ["says"]}])
def test_precedence_of_stop_strings(given: dict[str, Any], own: str | None) -> None:
    """A keyword has precedence over the model's config, even if it is None."""
    model, processor = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256), tiny_checkpoint.processor()
    vlm = SpeculativeVLM(model, processor, drafter="prompt-lookup")
    prompt = vlm._request(None, "What it says, it says again.", None).inputs()
    length, settings = prompt["input_ids"].shape[1], {"max_new_tokens": 24, "suppress_tokens": [tiny.EOS]}
    free = processor.tokenizer.decode(model.generate(**prompt, **settings)[0, length:])
    names = {"says": free[4:6], "again": free[8:10]}
    model.generation_config.stop_strings = names.get(own or "")
    given = {k: v and ([names[x] for x in v] if isinstance(v, list) else names[v]) for k, v in given.items()}
    wanted = model.generate(**prompt, **settings, **given, tokenizer=processor.tokenizer)[0, length:].tolist()
    assert vlm.generate(**prompt, **settings, **given).tokens == wanted


@pytest.mark.parametrize("backend", ["plain", "measure"])
def test_options_of_the_encoder_reach_it(backend: str) -> None:
    """Also if the cache holds the same image, encoded without the option."""
    model = tiny.llava(sharpness=10.0)
    vlm, found = SpeculativeVLM(model, None, SpeculativeConfig(backend=backend), "prompt-lookup"), []
    for told in ({}, {"vision_feature_layer": -1}, {"vision_feature_layer": 1}, {}):
        wanted = model.generate(**INPUTS, **told, max_new_tokens=12)[0, INPUTS["input_ids"].shape[1] :].tolist()
        assert vlm.generate(**INPUTS, **told, max_new_tokens=12).tokens == wanted
        found.append(wanted)
    assert found[0] != found[1] or found[0] != found[2], "the setting means something"
    with pytest.raises(ValueError, match="do not match"):
        vlm.generate(**INPUTS, vision_feature_select_strategy="full", max_new_tokens=4)
