"""The target's own multi-token-prediction layers draft trees: its output, and the library's drafts along the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.generation.candidate_generator as library
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_layers import MtpModel

import tiny
from family_layouts import WORDS
from msd.config import SpeculativeConfig
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.mtp import MtpDrafter
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import Past
from msd.targets import registry as targets
from msd.targets.base import Target
from mtp_targets import TARGETS, layers_of
from serve.batches import check_a_late_join, check_joining

TREE = SpeculativeConfig(nodes=12, depth=4, adaptive=False, backend="plain")
GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
ONLY_WORDS = {**GREEDY, "suppress_tokens": list(range(WORDS))}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_new_tokens": 16, "eos_token_id": None}
ASSISTED = [("kimi_k25", 1), ("kimi_k25", 2), ("glm4_moe", 1), ("step3p7", 1), ("step3p7", 3)]
HYBRIDS = [("qwen3_5", 1), ("qwen3_5", 2), ("qwen3_5_moe", 1)]  # the library refuses to draft for them


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters for the architectures that have none."""
    for name in TARGETS:
        if name not in targets._FAMILIES:
            monkeypatch.setitem(targets._FAMILIES, name, targets.Family(name, ("image",), Target))


def plain(model: Any, given: dict[str, Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(("name", "layers"), [*ASSISTED, *HYBRIDS])
def test_output_is_the_targets(name: str, layers: int) -> None:
    """Greedy in a left-padded batch of three, and with a seed."""
    model, some = TARGETS[name].make(layers), TARGETS[name].inputs(3)
    engine = SpeculativeVLM(model, None, TREE, MtpDrafter(layers_of(model, layers)))
    results = engine.generate(**some, **GREEDY)
    assert [r.tokens for r in results] == plain(model, some, **GREEDY)
    assert results[0].statistics.num_draft_tokens > 3 * 16
    one = TARGETS[name].inputs(1)
    assert engine.generate(**one, **SAMPLED, seed=3).tokens == plain(model, one, 3, **SAMPLED)[0]


def chain(depth: int) -> SpeculativeConfig:
    return SpeculativeConfig(nodes=depth, depth=depth, width=1, adaptive=False, backend="plain")


def chains(model: Any, network: MtpModel, given: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[tuple, list[int]]:
    """The library's drafts for one prompt: text so far -> drafted tokens."""
    found = {}
    propose = library.MTPCandidateGenerator.get_candidates

    def noted(self: Any, input_ids: Tensor, **options: Any) -> Any:
        out = propose(self, input_ids, **options)
        found[tuple(input_ids[0].tolist())] = out[0][0, input_ids.shape[1] :].tolist()
        return out

    patch.setattr(MtpModel, "from_pretrained", classmethod(lambda *_, **__: network))
    patch.setattr(library.MTPCandidateGenerator, "get_candidates", noted)
    model.generate(**given, **GREEDY, use_mtp=True)
    return {text: drafted for text, drafted in found.items() if drafted}


@pytest.mark.parametrize(("name", "layers"), ASSISTED)
def test_the_most_probable_path_is_the_librarys_chain(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and as a row of a left-padded batch of three."""
    model = TARGETS[name].make(layers)
    network, several, most, rows = layers_of(model, layers), TARGETS[name].inputs(3), 0, range(3)
    drafted: dict[tuple, list[int]] = {}
    propose = MtpDrafter.propose

    def noted(self: Any, state: Any, *others: Any) -> DraftTree:
        tree = propose(self, state, *others)
        for row in rows:
            text = tuple(state.layout.tokens[row, state.layout.start[row] : state.layout.end[row]].tolist())
            drafted[text] = tree.tokens[row, 1:][tree.valid[row, 1:]].tolist()
        return tree

    monkeypatch.setattr(MtpDrafter, "propose", noted)
    SpeculativeVLM(model, None, chain(layers), MtpDrafter(network)).generate(**several, **GREEDY)
    width = several["input_ids"].shape[1]
    start = (several["attention_mask"] == 0).sum(1).tolist()
    for row in rows:
        one = {k: v[row : row + 1, start[row] :] for k, v in several.items() if k in ("input_ids", "attention_mask")}
        for k, v in several.items():
            if k not in one:
                one[k] = v[len(v) // 3 * row : len(v) // 3 * (row + 1)]
        assert one["input_ids"].shape[1] == width - start[row]
        theirs = chains(model, network, one, monkeypatch)
        common = [text for text in drafted if text in theirs and len(drafted[text]) == layers]
        assert [drafted[text] for text in common] == [theirs[text] for text in common]
        most = max(most, len(common))
    assert most > 6


@torch.no_grad()
def from_scratch(network: MtpModel, ids: Tensor, states: Tensor, positions: Tensor, depth: int) -> list[int]:
    """Drafts by the library's layers, which read the whole text [1, L] anew; a single layer does so for each level.

    states: [1, L - 1, H], the target's at all tokens but the last. positions: [3, 1, L - 1], those of the states.
    """
    read, cache, above, tokens = ids[:, 1:], DynamicCache(), states, list[int]()
    for k in range(depth):
        single = len(network.layers) == 1
        above = network.forward_layer(0 if single else k, above, positions, cache, input_ids=read)
        tokens.append(int(network._project_to_logits(above[:, -1]).argmax()))
        drafted = torch.tensor([tokens[-1:]])
        read = torch.cat([read if single else read[:, 1:], drafted], 1)
        if single:
            states = above = torch.cat([states, above[:, -1:]], 1)
            positions, cache = torch.cat([positions, positions[:, :, -1:] + 1], 2), DynamicCache()
    return tokens


@pytest.mark.parametrize(("name", "layers"), HYBRIDS)
def test_the_most_probable_path_on_a_hybrid(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the library's layers, beside images, at the positions of the states; in a left-padded batch of three."""
    target, depth = TARGETS[name], 3 if layers == 1 else layers
    model, several = target.make(layers), target.inputs(3)
    network = layers_of(model, layers)
    drafted: list[dict[int, list[int]]] = [{}, {}, {}]
    propose = MtpDrafter.propose

    def noted(self: Any, state: Any, *others: Any) -> DraftTree:
        tree = propose(self, state, *others)
        for row, found in enumerate(drafted):
            found[state.layout.end[row]] = tree.tokens[row, 1:][tree.valid[row, 1:]].tolist()
        return tree

    monkeypatch.setattr(MtpDrafter, "propose", noted)
    results = SpeculativeVLM(model, None, chain(depth), MtpDrafter(network)).generate(**several, **ONLY_WORDS)
    width = several["input_ids"].shape[1]
    compared = 0
    for row, start in enumerate((several["attention_mask"] == 0).sum(1).tolist()):
        text = torch.tensor([several["input_ids"][row, start:].tolist() + results[row].tokens])
        images = {k: v.chunk(3)[row] for k, v in several.items() if k in ("pixel_values", "image_grid_thw")}
        given = target.text(text, torch.ones_like(text)) | images
        places = model._prepare_position_ids_for_generation(text, dict(given))[-3:]
        assert (places[0] != places[1]).any(), "M-RoPE"
        with torch.no_grad():
            states = model.model(**given, position_ids=places).last_hidden_state
        for end, tokens in drafted[row].items():
            L = end - start
            assert end >= width
            if len(tokens) == depth:
                wanted = from_scratch(network, text[:, :L], states[:, : L - 1], places[:, :, : L - 1], depth)
                assert tokens == wanted
                compared += 1
    assert compared > 20


@pytest.mark.parametrize(("name", "layers"), [("kimi_k25", 1), ("step3p7", 3)])
def test_a_tree_contains_the_chain(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first child of each node leads along the drafts of a tree that is one node wide, level after level."""
    model, given = TARGETS[name].make(layers), TARGETS[name].inputs(3)
    network = layers_of(model, layers)
    paths: dict[int, dict[tuple, list[int]]] = {1: {}, 3: {}}
    propose = MtpDrafter.propose

    def noted(self: Any, state: Any, budget: Any, sampler: Any) -> DraftTree:
        tree = propose(self, state, budget, sampler)
        for row in budget.rows:
            node, path = 0, []
            while (below := ((tree.parents[row] == node) & tree.valid[row]).nonzero()[:, 0].tolist()) != []:
                assert tree.q is not None
                node = max(below, key=lambda n: float(tree.q[row, n]))
                path.append(int(tree.tokens[row, node]))
            paths[budget.width or 3][tuple(state.layout.history(row).tolist())] = path
        return tree

    monkeypatch.setattr(MtpDrafter, "propose", noted)
    for width in (1, None):
        config = SpeculativeConfig(nodes=60, depth=4, width=width, adaptive=False, backend="plain")
        SpeculativeVLM(model, None, config, MtpDrafter(network)).generate(**given, **GREEDY)
    common = [text for text in paths[1] if text in paths[3]]
    for text in common:  # a node whose path is less probable than three others is not expanded
        assert paths[3][text] and paths[3][text] == paths[1][text][: len(paths[3][text])]
    assert len(common) > 9 and max(len(paths[3][text]) for text in common) == (4 if layers == 1 else 3)


@pytest.mark.parametrize(("name", "layers"), [("step3p7", 3), ("qwen3_5", 1)])
def test_turns_of_a_chat(name: str, layers: int) -> None:
    """A later turn reuses the target's states; the layers read the whole text."""
    target = TARGETS[name]
    model, past = target.make(layers), Past()
    engine = SpeculativeVLM(model, None, TREE, MtpDrafter(layers_of(model, layers)))
    given = target.inputs(1)
    for _ in range(3):
        result = engine.generate(**given, **ONLY_WORDS, past=past)
        assert result.tokens == plain(model, given, **ONLY_WORDS)[0] and result.statistics.num_draft_tokens > 16
        ids = torch.cat([given["input_ids"], torch.tensor([[*result.tokens, 20, 21]])], 1)
        given |= target.text(ids, torch.ones_like(ids))
    assert result.statistics.num_prefill_rows < 8


def test_the_layers_of_a_checkpoint_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in its file, loaded by the library, and the same as those that were saved."""
    model = TARGETS["glm4_moe"].make(2)
    network = layers_of(model, 2)
    model.save_pretrained(tmp_path / "without")
    model.save_pretrained(tmp_path / "with")
    path = tmp_path / "with" / "model.safetensors"
    stored = load_file(path)
    for name, weight in network.state_dict().items():
        if name.startswith("layers."):
            number, rest = name.split(".", 2)[1:]
            stored[f"model.layers.{3 + int(number)}.{rest.replace('mtp_block.', '')}"] = weight.clone()
    save_file(stored, path, metadata={"format": "pt"})
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"layers\.3\.", r"layers\.4\."])
    loaded, bare = (type(model).from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("with", "without"))
    engine = SpeculativeVLM(loaded, None, TREE)
    assert (engine.drafter.name, engine.reason) == ("mtp", "the target's checkpoint brings it")
    assert isinstance(engine.drafter, MtpDrafter)
    for name, weight in engine.drafter.network.layers.state_dict().items():
        assert torch.equal(weight, network.layers.state_dict()[name]), name
    given = TARGETS["glm4_moe"].inputs(1)
    assert engine.generate(**given, **GREEDY).tokens == plain(model, given, **GREEDY)[0]
    other = SpeculativeVLM(bare, None, TREE)
    assert (other.drafter.name, other.reason) == ("prompt-lookup", "there is no drafter for this target")
    with pytest.raises(UserError, match=r"method 'mtp': target '.*' has no multi-token-prediction layers"):
        SpeculativeVLM(bare, None, TREE, "mtp")


def test_a_target_without_layers_is_refused() -> None:
    assert "mtp" not in registry.methods(), "only for some checkpoints"
    with pytest.raises(UserError, match=r"method 'mtp': target '.*' has no multi-token-prediction layers"):
        SpeculativeVLM(tiny.llava(), None, TREE, "mtp")


@pytest.mark.parametrize(("name", "layers"), [("kimi_k25", 1), ("qwen3_5", 2)])
def test_requests_join_and_leave_a_batch(name: str, layers: int) -> None:
    model = TARGETS[name].make(layers)
    engine = SpeculativeVLM(model, None, TREE, MtpDrafter(layers_of(model, layers)))
    lengths = [40, 12, 28, 6, 20, 30]
    check_joining(
        engine,
        [(TARGETS[name].inputs(1, 6 + 3 * (i % 4)), {**GREEDY, "max_new_tokens": n}) for i, n in enumerate(lengths)],
    )


def test_a_long_prompt_joins_after_a_long_pause() -> None:
    target = TARGETS["kimi_k25"]
    model = target.make(1)
    engine = SpeculativeVLM(model, None, TREE, MtpDrafter(layers_of(model, 1)))
    short, long = target.inputs(1, 4), target.inputs(1, 120)
    check_a_late_join(engine, (short, {**GREEDY, "max_new_tokens": 70}), (long, {**GREEDY, "max_new_tokens": 8}))
