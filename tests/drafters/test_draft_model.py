"""A second model drafts: a copy of the target has all drafts accepted, and any other changes the drafts alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from families import BY_NAME
from family_layouts import EOS, PAD, VOCABULARY
from family_processor import FamilyProcessor, photos
from msd.config import SpeculativeConfig
from msd.drafters.algorithms.draft_model import DraftModel
from msd.drafters.toolkit import second_model
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget, Plan

LENGTH = 13
CHAIN = SpeculativeConfig(nodes=4, depth=4, width=1, adaptive=False, backend="plain")
TREE = SpeculativeConfig(nodes=12, depth=4, adaptive=False, backend="plain")
GREEDY = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": LENGTH}
LLAVA = BY_NAME["llava"]
QUICK = ("llava", "qwen3_vl")
COPIED = ("qwen2_5_vl", "gemma3", "smolvlm", "internvl", "llava_onevision", "mistral3_window", "paligemma2", "qwen2_vl")


def inputs(name: str, rows: int = 1, kind: str = "image") -> dict[str, Any]:
    """Prompts of different lengths, each with a picture."""
    family = BY_NAME[name]
    return family.batch([family.parts(s, [kind], words=12 - 3 * s) for s in range(rows)])


def noisy(model: PreTrainedModel, amount: float = 0.3) -> PreTrainedModel:
    """A copy with changed weights: a draft model that is often right."""
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * weight.std() * amount)
    return changed.eval()


def language_model(vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.eval()


def plain(model: PreTrainedModel, given: dict[str, Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


def answers(engine: SpeculativeVLM, **arguments: Any) -> list[Any]:
    found = engine.generate(**arguments)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in COPIED)])
def test_every_draft_of_a_copy_of_the_target_is_accepted(name: str) -> None:
    """With pictures, alone and in a left-padded batch of three: each step emits the whole chain and one token more."""
    model = BY_NAME[name].make()
    for rows in (1, 3):
        given = inputs(name, rows)
        results = answers(SpeculativeVLM(model, None, CHAIN, DraftModel(copy.deepcopy(model))), **given, **GREEDY)
        assert [r.tokens for r in results] == plain(model, given, **GREEDY)
        found = results[0].statistics
        assert found.num_accepted_draft_tokens == found.num_draft_tokens == rows * 9, "4, 4 and 1 of 12 after the first"


@pytest.mark.parametrize("sees", ["image", "nothing"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_trees_of_another_model_change_no_answer(sees: str, settings: dict[str, Any]) -> None:
    model = BY_NAME["qwen3_vl"].make()
    engine = SpeculativeVLM(model, None, TREE, DraftModel(noisy(model), sees=sees))
    given = inputs("qwen3_vl")
    (result,) = answers(engine, **given, **settings, seed=5)
    assert result.tokens == plain(model, given, 5, **settings)[0][: len(result.tokens)]
    assert result.statistics.num_draft_tokens > LENGTH


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY - 20, VOCABULARY + 7])
def test_a_language_model_drafts_from_the_text(vocabulary: int) -> None:
    """In a left-padded batch of three; its vocabulary may be smaller or larger."""
    model, given = LLAVA.make(), inputs("llava", 3)
    results = answers(SpeculativeVLM(model, None, TREE, DraftModel(language_model(vocabulary))), **given, **GREEDY)
    assert [r.tokens for r in results] == plain(model, given, **GREEDY)
    assert results[0].statistics.num_draft_tokens > LENGTH
