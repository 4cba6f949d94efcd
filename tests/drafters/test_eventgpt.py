"""An independent model drafts: the output is always the target's, and the drafts are those of the model alone."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from families import BY_NAME
from family_layouts import EOS, VOCABULARY, WORDS
from family_processor import FamilyProcessor, Letters, photos
from msd import events
from msd.config import SpeculativeConfig
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.eventgpt import EventGPT, EventGPTConfig, EventGPTDrafter, Pieces, VocabularyMap, save
from msd.errors import UserError
from msd.events import EventStream
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget, Plan

FAMILY = BY_NAME["video_llava"]
MODEL = FAMILY.make()
LENGTH = 14
CONFIG = SpeculativeConfig(nodes=9, depth=4, adaptive=False)
MARKS = tuple(f"<{i}>" for i in range(WORDS))
THEIRS = Pieces((*MARKS, *(f"w{i}" for i in range(WORDS, VOCABULARY))), frozenset(range(WORDS)))
# the target's tokens in reverse order, between special tokens and tokens that only the drafter has
OWN = Pieces(
    ("<unk>", MARKS[1], MARKS[EOS], "<event>", *reversed(THEIRS.names[WORDS:]), "more", "words"),
    frozenset({0, 1, 2, 3}),
)
WORDS_MAP = VocabularyMap.between(OWN, THEIRS)


def network(seed: int = 1, **changes: Any) -> EventGPT:
    """A random network with large weights, so that events change its distributions and these are not uniform."""
    torch.manual_seed(seed)
    made = EventGPT.for_text(MODEL.config.text_config, **({"vocabulary": len(OWN.names)} | changes)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() > 1:
                weight.mul_(10.0 if "lm_head" in name else 1.0 if "embed_tokens" in name else 6.0)
    return made


NETWORK = network()


def copied() -> EventGPTDrafter:
    """A drafter that is a copy of the target's language model."""
    made = network(vocabulary=VOCABULARY)
    made.llama.model.load_state_dict(MODEL.get_decoder().state_dict())
    made.llama.lm_head.load_state_dict(MODEL.get_output_embeddings().state_dict())
    return EventGPTDrafter(made, None, VocabularyMap.identity(VOCABULARY))


def drafter(made: EventGPT = NETWORK) -> EventGPTDrafter:
    return EventGPTDrafter(made, OWN, WORDS_MAP)


def scene(seed: int, count: int = 400) -> EventStream:
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 20, count), draw.integers(0, 16, count)
    return EventStream(np.sort(draw.integers(0, 9000, count)), x, y, draw.integers(0, 2, count), (20, 16))


def prompts(*kinds: tuple[str, ...]) -> dict[str, Any]:
    """A batch of prompts of different lengths, each with these kinds of images."""
    return FAMILY.batch([FAMILY.parts(s, shown, words=6 + 3 * s) for s, shown in enumerate(kinds)])


def plain(inputs: dict[str, Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return MODEL.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


GREEDY = {"do_sample": False, "max_new_tokens": LENGTH}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": LENGTH}


@pytest.mark.parametrize("kinds", [("video",), ("video", "image"), ()], ids=str)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seen", [True, False])
def test_output_is_the_targets(kinds: tuple[str, ...], settings: dict[str, Any], seen: bool) -> None:
    inputs = prompts(kinds)
    engine = SpeculativeVLM(MODEL, None, CONFIG, drafter())
    result = engine.generate(**inputs, **settings, seed=3, **({"events": scene(0)} if seen else {}))
    assert result.tokens == plain(inputs, 3, **settings)[0][: len(result.tokens)]
    assert result.finish == "length" or result.tokens[-1] == EOS
    assert result.statistics.num_draft_tokens > 0


@pytest.mark.parametrize("made", [drafter, copied])
def test_batches_of_unequal_prompts(made: Any) -> None:
    inputs = prompts(("video",), (), ("video", "image"))
    engine = SpeculativeVLM(MODEL, None, CONFIG, made())
    expected = plain(inputs, **GREEDY)
    for seen in (None, [scene(0), None, scene(1)]):
        results = engine.generate(**inputs, **GREEDY, **({"events": seen} if seen else {}))
        for row, result in enumerate(results):
            assert result.tokens == expected[row][: len(result.tokens)]
    torch.manual_seed(0)
    several = engine.generate(**prompts(("video",)), events=scene(0), num_return_sequences=3, seed=[1, 2, 3], **SAMPLED)
    for seed, result in zip((1, 2, 3), several, strict=True):
        assert result.tokens == plain(prompts(("video",)), seed, **SAMPLED)[0][: len(result.tokens)]


def own_text(made: EventGPTDrafter, layout: Layout, row: int, prompt: int, auxiliary: Tensor | None) -> Tensor:
    """The drafter's inputs [1, n, H] of a row, computed token by token."""
    net, words, out, placed = made.network, made.mapping, [], auxiliary is None or not bool(auxiliary[row].any())
    shown = [c for c in range(layout.start[row], prompt) if layout.modality[row, c] != LANGUAGE.id]
    where = shown[0] if shown else layout.start[row] + 1
    for column in range(layout.start[row], layout.end[row]):
        if column == where and not placed and auxiliary is not None:
            out += list(auxiliary[row])
        if column not in shown:
            token = int(layout.tokens[row, column])
            own = int(words.to_drafter[token])
            out.append(net.embed(torch.tensor(own if own >= 0 else words.unknown)))
    return torch.stack(out)[None]


def distribution(made: EventGPTDrafter, text: Tensor, path: list[int]) -> Tensor:
    """The draft distribution [V] over target ids after drafted tokens `path`, computed without a cache."""
    net, words = made.network, made.mapping
    drafted = [net.embed(words.to_drafter[token])[None, None] for token in path]
    logits = net.llama(inputs_embeds=torch.cat([text, *drafted], 1)).logits[0, -1]
    out = torch.zeros(VOCABULARY)
    out[words.ids] = logits[words.drafter_ids].softmax(-1)
    return out


class Pausing(Plan):
    """Drafts only in every fourth step, so that rows have different numbers of unread tokens."""

    steps = 0

    def budget(self, *arguments: Any) -> Budget:
        self.steps += 1
        found = super().budget(*arguments)
        return found if self.steps % 4 == 1 else Budget(0, [0 for _ in found.depth])


@pytest.mark.parametrize("pausing", [False, True])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("make", [drafter, copied])
def test_drafts_are_those_of_the_model_without_a_cache(
    make: Any, seen: bool, pausing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputes the whole text for every node, and compares its q and the children of the root."""
    inputs = prompts(("video",), (), ("image",))
    L, checked = inputs["input_ids"].shape[1], []
    propose = EventGPTDrafter.propose

    def watched(made: EventGPTDrafter, state: Any, budget: Any, sampler: Any) -> DraftTree:
        tree = propose(made, state, budget, sampler)
        for row in [r for r, depth in enumerate(budget.depth) if depth]:
            text, paths = own_text(made, state.layout, row, L, state.auxiliary), [[]]
            for node in range(1, tree.size):
                if not tree.valid[row, node]:
                    paths.append([])
                    continue
                above = paths[int(tree.parents[row, node])]
                token = int(tree.tokens[row, node])
                assert tree.q is not None
                assert abs(float(distribution(made, text, above)[token] - tree.q[row, node])) < 1e-4
                paths.append([*above, token])
            first = tree.tokens[row][(tree.parents[row] == 0) & tree.valid[row]].tolist()
            assert set(first) == set(distribution(made, text, []).topk(len(first)).indices.tolist())
            checked.append(len(first))
        return tree

    monkeypatch.setattr(EventGPTDrafter, "propose", watched)
    engine = SpeculativeVLM(MODEL, None, CONFIG, make())
    if pausing:
        engine.plan = Pausing(CONFIG.nodes, CONFIG.depth)
    engine.generate(**inputs, **({"events": [scene(0), scene(1), None]} if seen else {}), **GREEDY)
    assert len(checked) > 3 and sum(checked) > 6


def trees(engine: SpeculativeVLM, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[list[list[int]], list]:
    """(tokens of every tree, answers)."""
    found: list[list[int]] = []
    propose = EventGPTDrafter.propose

    def noted(*all_: Any) -> DraftTree:
        tree = propose(*all_)
        found.append(tree.tokens.flatten().tolist())
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(EventGPTDrafter, "propose", noted)
        results = engine.generate(**arguments, **GREEDY)
    return found, [r.tokens for r in (results if isinstance(results, list) else [results])]


def test_events_change_drafts_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drafter()
    engine, inputs = SpeculativeVLM(MODEL, None, CONFIG, made), prompts(("video",))
    one, other = made.encode(scene(0)), made.encode(scene(1))
    assert one.shape == (made.network.config.tokens, made.network.config.hidden) == (5 + 4, 32)
    assert (one - other).abs().max() > 1e-3
    found = [
        trees(engine, monkeypatch, **inputs, **given)
        for given in (
            {},
            {"events": scene(0)},
            {"events": scene(1)},
            {"auxiliary": one[None]},
            {"auxiliary": lambda: one[None]},
        )
    ]
    assert all(answers == found[0][1] for _, answers in found)
    drafts = [drafted for drafted, _ in found]
    assert drafts[0] != drafts[1] != drafts[2] != drafts[0]
    assert drafts[1] == drafts[3] == drafts[4]


def test_two_poolings_of_five_frames() -> None:
    pixels = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        seen = NETWORK.see(pixels)
        each = NETWORK.projector(NETWORK.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    assert torch.allclose(seen[:5], each.mean(1), atol=1e-5), "temporal: a frame's patches"
    assert torch.allclose(seen[5:], each.mean(0), atol=1e-5), "spatial: a patch of all frames"


def test_a_recording_is_five_frames_of_equally_many_events(tmp_path: Path) -> None:
    stream = scene(0)
    pixels = NETWORK.pixels(events.frames(stream, count=5, by="count"))
    assert pixels.shape == (5, 3, 16, 16)
    path = tmp_path / "scene.csv"
    rows = zip(stream.t, stream.x, stream.y, stream.p, strict=True)
    path.write_text("%geometry:20,16\n" + "".join(f"{t},{x},{y},{p}\n" for t, x, y, p in rows))
    with torch.no_grad():
        assert torch.equal(NETWORK.encode(stream), NETWORK.see(pixels))
        assert torch.equal(NETWORK.encode(path), NETWORK.encode(stream))


def test_all_drafts_of_a_copy_of_the_target_are_accepted() -> None:
    """Every step but the last accepts the whole chain."""
    inputs, chain = prompts(()), SpeculativeConfig(nodes=4, depth=4, width=1, adaptive=False)
    result = SpeculativeVLM(MODEL, None, chain, copied()).generate(**inputs, **GREEDY)
    assert result.tokens == plain(inputs, **GREEDY)[0][: len(result.tokens)]
    assert [step.accepted for step in result.statistics.steps[:-1]] == [4] * (len(result.statistics.steps) - 1)
    assert result.statistics.mean_acceptance_length > 4


def test_the_first_token_is_read_before_the_first_step() -> None:
    """A copy predicts the answer's first token correctly, so its first step needs no pass for the root."""
    passes: list[int] = []
    made = copied()
    made.network.llama.model.register_forward_hook(
        lambda _module, _args, output: passes.append(output.last_hidden_state.shape[1])
    )
    settings, inputs = {"do_sample": False, "max_new_tokens": 3}, prompts(())
    SpeculativeVLM(MODEL, None, CONFIG, made).generate(**inputs, **settings)
    assert passes == [inputs["input_ids"].shape[1], 1], "prompt and guess; one level of drafts takes no more"


@pytest.mark.alone
def test_statistics_of_work_that_overlaps_with_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """First prefill ends 0.1 s after the drafter's work, then 0.1 s before it."""
    made, inputs = drafter(), prompts(("video",))
    engine = SpeculativeVLM(MODEL, None, CONFIG, made)
    prefill, read_prompt, read, filled = engine.target.prefill, made.read_prompt, Event(), Event()

    def reads(*arguments: Any) -> Any:
        memory = read_prompt(*arguments)
        read.set()
        return memory

    def slow(*arguments: Any) -> Any:
        assert read.wait(60)
        time.sleep(0.1)
        return prefill(*arguments)

    monkeypatch.setattr(made, "read_prompt", reads)
    monkeypatch.setattr(engine.target, "prefill", slow)
    seconds = engine.generate(**inputs, events=scene(0), **GREEDY).statistics.seconds
    assert 0 < seconds["beside_overlap"] <= seconds["beside"] + 1e-6
    assert seconds["beside_wait"] < 0.1 < seconds["prefill"]

    def quick(*arguments: Any) -> Any:
        time.sleep(0.1)
        state = prefill(*arguments)
        filled.set()
        return state

    def late() -> Tensor:
        assert filled.wait(60)
        time.sleep(0.1)
        return made.encode(scene(0))[None]

    monkeypatch.setattr(engine.target, "prefill", quick)
    seconds = engine.generate(**inputs, auxiliary=late, **GREEDY).statistics.seconds
    assert 0.1 <= seconds["beside_overlap"] < seconds["beside"] - 0.05
    assert 0.05 < seconds["beside_wait"] <= seconds["draft"]
    assert seconds["beside_overlap"] + seconds["beside_wait"] <= seconds["beside"] + 0.05
    assert "beside" not in SpeculativeVLM(MODEL, None, CONFIG, "ar").generate(**inputs, **GREEDY).statistics.seconds


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_targets_of_other_kinds(name: str) -> None:
    """The drafter's positions do not depend on the target's: three rotary axes, or sliding-window layers."""
    family = BY_NAME[name]
    model, parts = family.make(), [family.parts(s, ["image"] * s, words=8 + s) for s in range(2)]
    inputs = family.batch(parts)
    answers = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :].tolist()
    results = SpeculativeVLM(model, None, CONFIG, drafter()).generate(**inputs, events=[scene(0), None], **GREEDY)
    for row, result in enumerate(results):
        assert result.tokens == answers[row][: len(result.tokens)] and result.statistics.num_draft_tokens > 0


def test_chats_and_streams(tmp_path: Path) -> None:
    processor = FamilyProcessor(FAMILY)
    theirs = Pieces.of(Letters())
    own = Pieces((*theirs.names, "more"), theirs.special)
    engine = SpeculativeVLM(MODEL, processor, CONFIG, EventGPTDrafter(network(vocabulary=len(own.names)), own))
    (photo,) = photos(FAMILY, tmp_path, 1)
    fresh, chat = engine.with_method("ar"), engine.chat()
    first = chat.say("What?", photo, events=scene(0), **GREEDY)
    assert first.tokens == fresh.generate(photo, "What?", **GREEDY).tokens
    messages = [*chat.messages, {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    second = chat.say("And?", events=scene(1), **GREEDY)
    assert second.tokens == fresh.generate([photo], messages=messages, **GREEDY).tokens
    assert "".join(engine.stream(photo, "What?", events=scene(0), **GREEDY)) == first.text


def test_wrong_inputs_raise_user_errors(tmp_path: Path) -> None:
    inputs = prompts(("video",))
    engine = SpeculativeVLM(MODEL, None, CONFIG, drafter())
    with pytest.raises(UserError, match="'ar' sees no events; 'eventgpt' does"):
        engine.with_method("ar").generate(**inputs, events=scene(0), **GREEDY)
    assert engine.with_method("ar").generate(**inputs, events=[None], **GREEDY).tokens
    with pytest.raises(UserError, match="1 prompts but 2 event recordings"):
        engine.generate(**inputs, events=[scene(0), None], **GREEDY)
    with pytest.raises(UserError, match="not both"):
        engine.generate(**inputs, events=scene(0), auxiliary=torch.zeros(1, 9, 32), **GREEDY)
    with pytest.raises(UserError, match="there is no file"):
        engine.generate(**inputs, events=tmp_path / "none.csv", **GREEDY)
    with pytest.raises(UserError, match="9 event tokens of 32 numbers"):
        engine.generate(**inputs, auxiliary=torch.ones(1, 8, 32), **GREEDY)
    with pytest.raises(UserError, match="vocabulary of its own"):
        SpeculativeVLM(MODEL, None, CONFIG, EventGPTDrafter(NETWORK, OWN))


def test_a_folder_is_a_method(tmp_path: Path) -> None:
    save(NETWORK, OWN, tmp_path, WORDS_MAP)
    assert registry.register_folder(tmp_path) == "eventgpt"
    made = registry.create("eventgpt")
    assert isinstance(made, EventGPTDrafter) and made.network.config == NETWORK.config and made.pieces == OWN
    for name, tensor in NETWORK.state_dict().items():
        assert torch.allclose(made.network.state_dict()[name], tensor, atol=1e-2), name
    twin = made.twin(tiny.llava())
    assert SpeculativeVLM(tiny.llava(), None, CONFIG, twin).generate(**tiny.llava_inputs(), **GREEDY).tokens
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"frames"', '"pictures"'))
    with pytest.raises(UserError, match="field 'frames' is missing"):
        registry.register_folder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pieces.json").unlink()
    with pytest.raises(UserError, match=r"its piece table pieces\.json cannot be read"):
        registry.register_folder(tmp_path)
    with pytest.raises(UserError, match="patches must fill a frame"):
        EventGPT.for_text(MODEL.config.text_config, image_size=17)
    assert EventGPTConfig.from_json(config) == NETWORK.config
