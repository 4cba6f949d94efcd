"""An assistant drafts trees from the target's keys and values: the target's output, and the library's drafts.

transformers 5.23 cannot construct an assistant: `Gemma4TextConfig.kv_sharing_modes` raises for a model all of whose
layers share keys. A fixture corrects the property; without it, the assistant's folder is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.generation.candidate_generator as library
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

import tiny
import tiny_checkpoint
from family_layouts import BOS, END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY, WORDS
from msd.config import SpeculativeConfig
from msd.core.tree import DraftTree
from msd.drafters.algorithms.assistant import AssistantDrafter
from msd.errors import UserError
from msd.loading import load_draft_model
from msd.model import SpeculativeVLM
from msd.targets import Past
from msd.targets import registry as targets
from msd.targets.base import Target
from serve.batches import check_joining

TREE = SpeculativeConfig(nodes=12, depth=4, adaptive=False, backend="plain")
GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_new_tokens": 16, "eos_token_id": None}
WINDOWS = [12, 400]  # of sliding layers: shorter and longer than the prompts


@pytest.fixture
def constructible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrects the library's property: the last layer of each type that keeps its keys stores them."""

    def modes(config: Any) -> list[str | None]:
        shared = config.num_kv_shared_layers or 0
        kept = config.layer_types[: config.num_hidden_layers - shared]
        last = {kind: i for i, kind in enumerate(kept)}
        return ["store" if i in last.values() else None for i in range(len(kept))] + ["reuse"] * shared

    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(modes))


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    if "gemma4" not in targets._FAMILIES:
        monkeypatch.setitem(targets._FAMILIES, "gemma4", targets.Family("Gemma 4", ("image",), Target))


def text(layers: int, shared: int, window: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "pad_token_id": PAD,
        "max_position_embeddings": 512, "bos_token_id": BOS, "eos_token_id": EOS, "sliding_window": window,
        "num_kv_shared_layers": shared, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "tie_word_embeddings": False,
        "rope_parameters": {"sliding_attention": rope[0], "full_attention": rope[1] | {"rope_theta": 1e6}},
    } | more  # fmt: skip


def gemma4(shared: int, window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 5, "boi_token_id": START}
    config = Gemma4Config(
        text_config=text(6, shared, window), vision_config=vision, audio_config=None, eoi_token_id=END, **marks,
        tie_word_embeddings=False,
    )  # fmt: skip
    return finished(Gemma4ForConditionalGeneration(config))


def assistant(window: int, ordered: bool = False) -> PreTrainedModel:
    torch.manual_seed(5)
    own = text(2, 2, window, vocab_size_per_layer_input=0, hidden_size_per_layer_input=0, model_type="gemma4_text")
    config = Gemma4AssistantConfig(
        text_config=own, backbone_hidden_size=32, use_ordered_embeddings=ordered, num_centroids=8,
        centroid_intermediate_top_k=4, tie_word_embeddings=False,
    )  # fmt: skip
    made = finished(Gemma4AssistantForCausalLM(config))
    if ordered:
        made.masked_embedding.token_ordering.copy_(torch.randperm(VOCABULARY))
    made.generation_config.num_assistant_tokens = 4
    return made


def finished(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                weight.mul_(4)
        model.lm_head.weight.mul_(10)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def inputs(rows: int) -> dict[str, Any]:
    """Prompts of different lengths, left-padded, with an image of four tokens in each."""
    g, ids = torch.Generator().manual_seed(0), []
    for row in range(rows):
        words = torch.randint(WORDS, VOCABULARY, (14 - 4 * row,), generator=g).tolist()
        ids.append([BOS, *words[:3], START, *[IMAGE] * 4, END, *words, *words[:5]])
    width = max(map(len, ids))
    out = {
        "input_ids": torch.tensor([[PAD] * (width - len(x)) + x for x in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids]),
        "pixel_values": torch.rand(rows, 16, 48, generator=g),
        "image_position_ids": torch.tensor([[[x, y] for y in range(4) for x in range(4)]] * rows),
    }
    return out | {"mm_token_type_ids": (out["input_ids"] == IMAGE).long()}


def plain(model: Any, given: dict[str, Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.usefixtures("constructible")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shared", [0, 2])
def test_output_is_the_targets(shared: int, window: int) -> None:
    """Greedy in a left-padded batch of three, with a seed, and in a later turn."""
    model = gemma4(shared, window)
    engine, some, one = SpeculativeVLM(model, None, TREE, AssistantDrafter(assistant(window))), inputs(3), inputs(1)
    results = engine.generate(**some, **GREEDY)
    assert [r.tokens for r in results] == plain(model, some, **GREEDY)
    assert results[0].statistics.num_draft_tokens > 3 * 16
    assert engine.generate(**one, **SAMPLED, seed=3).tokens == plain(model, one, 3, **SAMPLED)[0]
    past, words = Past(), {**GREEDY, "suppress_tokens": list(range(WORDS))}
    for _ in range(2):
        result = engine.generate(**one, **words, past=past)
        assert result.tokens == plain(model, one, **words)[0]
        ids = torch.cat([one["input_ids"], torch.tensor([[*result.tokens, 20, 21]])], 1)
        one |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long()}


def chains(model: Any, helper: Any, given: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[tuple, list[int]]:
    """The library's drafts, text so far -> tokens, without the keys of rejected drafts, which its loop leaves there."""
    kind, found = library.SinglePositionMultiTokenCandidateGenerator, {}
    propose = kind.get_candidates

    def noted(self: Any, ids: torch.Tensor, model_kwargs: Any = None, model_outputs: Any = None, **more: Any) -> Any:
        if model_outputs is not None and not self.is_main_model_prefill:
            stale = model_outputs.hidden_states[-1].shape[1] - 1 - int(more.get("n_last_matches", 0))
            model_outputs = copy.copy(model_outputs)
            if stale:
                kept = {k: tuple(x[:, :, :-stale] for x in v) for k, v in model_outputs.shared_kv_states.items()}
                model_outputs.shared_kv_states = kept
        out = propose(self, ids, model_kwargs=model_kwargs, model_outputs=model_outputs, **more)
        found[tuple(ids[0].tolist())] = out[0][0, ids.shape[1] :].tolist()
        return out

    patch.setattr(kind, "get_candidates", noted)
    model.generate(**given, **GREEDY, assistant_model=helper)
    return {text: drafted for text, drafted in found.items() if drafted}


@pytest.mark.usefixtures("constructible")
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_chain_is_the_librarys(shared: int, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no window is shorter than the text: with one, the library's mask depends on what its cache has dropped."""
    model, helper, given = gemma4(shared, 400), assistant(400, ordered), inputs(1)
    drafted: dict[tuple, list[int]] = {}
    propose = AssistantDrafter.propose

    def noted(self: Any, state: Any, *others: Any) -> DraftTree:
        tree = propose(self, state, *others)
        drafted[tuple(state.layout.history(0).tolist())] = tree.tokens[0, 1:].tolist()
        return tree

    monkeypatch.setattr(AssistantDrafter, "propose", noted)
    chain = SpeculativeConfig(nodes=4, depth=4, width=1, adaptive=False, backend="plain")
    SpeculativeVLM(model, None, chain, AssistantDrafter(helper)).generate(**given, **GREEDY)
    theirs = chains(model, helper, given, monkeypatch)
    common = [text for text in drafted if len(drafted[text]) == len(theirs.get(text, ())) == 4]
    assert [drafted[text] for text in common] == [theirs[text] for text in common] and len(common) > 6


@pytest.mark.usefixtures("constructible")
def test_a_folder_is_named_like_a_draft_model(tmp_path: Path) -> None:
    assistant(12).save_pretrained(tmp_path)
    model, given = gemma4(0, 12), inputs(1)
    drafter = load_draft_model(tmp_path)
    result = SpeculativeVLM(model, None, TREE, drafter).generate(**given, **GREEDY)
    assert result.method == "assistant" and result.tokens == plain(model, given, **GREEDY)[0]
    with pytest.raises(UserError, match="leave out draft_sees"):
        load_draft_model(tmp_path, "image")
    with pytest.raises(UserError, match=r"assistant '.*' is not made for target"):
        SpeculativeVLM(tiny.llava(), None, TREE, drafter)


def test_an_assistant_that_the_library_cannot_construct_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as corrected:
        constructible.__wrapped__(corrected)  # type: ignore[attr-defined]
        assistant(12).save_pretrained(tmp_path)
    tiny_checkpoint.processor().tokenizer.save_pretrained(tmp_path)  # without one, that is what the message is about
    with pytest.raises(UserError, match=r"cannot be loaded: .*The set of layer types producing a cache"):
        load_draft_model(tmp_path)


def test_requests_join_and_leave_a_batch(constructible: None) -> None:
    engine = SpeculativeVLM(gemma4(3, 12), None, TREE, AssistantDrafter(assistant(12)))
    given, requests = inputs(3), []
    for i, n in enumerate([40, 12, 28, 6, 20, 30]):
        row = {name: x[i % 3, None] for name, x in given.items()}
        seen = row.pop("attention_mask")[0].bool()
        row = {name: x[:, seen] if name in ("input_ids", "mm_token_type_ids") else x for name, x in row.items()}
        requests.append((row, {**GREEDY, "max_new_tokens": n}))
    check_joining(engine, requests)
