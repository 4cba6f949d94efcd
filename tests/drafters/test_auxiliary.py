"""Auxiliary tokens change drafts, never the output; training and decoding read the same ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
import tiny_checkpoint
from msd.config import SpeculativeConfig
from msd.core.tree import DraftTree
from msd.drafters import auxiliary
from msd.drafters.algorithms.msd import MSD, DraftObjective, MSDConfig, MSDNetwork
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.drafters.auxiliary import FRAMES, AuxiliarySource
from msd.drafters.toolkit.drafter import Memory
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train.losses.msd import LossConfig

MODEL = tiny.llava()
GROUPS = ((3, 2), (4, 1))
GIVEN, KEPT = 7, 3


def network(**changes: Any) -> MSDNetwork:
    """A network whose parameters are all random."""
    torch.manual_seed(1)
    config = MSDConfig.for_target(MODEL.config.text_config, 60, rank=4, parent_rank=8, auxiliary=GROUPS, **changes)
    made = MSDNetwork(config)
    made.heads.ids = torch.arange(4, 64)
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return made.attach(MODEL).eval()


def teacher_batch(made: MSDNetwork, rows: int = 3) -> TeacherBatch:
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(rows)))
    return run_teacher(adapt(MODEL, made.config.taps), inputs, [[5, 6, 7, 8]] * rows)


def some(rows: int, without: int | None = None) -> Tensor:
    torch.manual_seed(2)
    tokens = torch.randn(rows, GIVEN, MODEL.config.text_config.hidden_size)
    if without is not None:
        tokens[without] = 0
    return tokens


def root_logits(made: MSDNetwork, taught: TeacherBatch, tokens: Tensor | None) -> Tensor:
    assert taught.taps is not None
    L = taught.prompt
    layout = replace(taught.layout, end=[L + 1] * taught.layout.batch)
    memory = Memory.begin(made, layout, taught.taps[:, :L], tokens)
    anchors = memory.anchors()
    levels = made.levels(anchors, layout.newest())
    return levels.root(made.routed(memory.anchor)[:, None]).logits[:, 0]


@pytest.mark.parametrize("form", ["block", "ar"])
@pytest.mark.parametrize("vision", [True, False])
def test_training_and_decoding_read_the_same_tokens(form: str, vision: bool) -> None:
    made = network(form=form, vision=vision)
    taught = replace(teacher_batch(made), auxiliary=some(3, without=1))
    objective = DraftObjective(made, LossConfig())
    with torch.no_grad():
        drafts, states = objective.states(taught, torch.zeros(3, 1, dtype=torch.long))
        route = objective.routes(taught, drafts, states).exp()
        learnt, _ = objective.logits(taught, drafts, states, route)
        assert torch.allclose(root_logits(made, taught, taught.auxiliary), learnt[:, 0, 0], atol=1e-4)


def test_rows_read_only_their_own_tokens() -> None:
    made = network()
    taught = teacher_batch(made)
    with torch.no_grad():
        nothing, all_, but_one = (root_logits(made, taught, b) for b in (None, some(3), some(3, without=1)))
    for row in range(3):
        assert (all_[row] - nothing[row]).abs().max() > 1e-3
        other = nothing if row == 1 else all_
        assert torch.allclose(but_one[row], other[row], atol=1e-4)


def test_kept_tokens_come_before_the_text() -> None:
    made = network()
    taught = teacher_batch(made)
    assert taught.taps is not None
    with torch.no_grad():
        read = (made.read(taught.layout, taught.taps[:, :-1], None, b) for b in (None, some(3, without=1)))
        plain, found = (entries.selection for entries in read)
    extra = found.present.sum(1) - plain.present.sum(1)
    assert extra.tolist() == [KEPT, 0, KEPT]
    for row in range(3):
        first = int(extra[row])
        n = int(plain.present[row].sum())
        assert torch.equal(found.embedding[row, first : first + n], plain.embedding[row, :n])
        assert torch.equal(found.slot[row], plain.slot[row] + first)


def test_a_group_is_read_by_its_own_queries() -> None:
    """Tokens of the first group change its kept tokens and the global vector, not the second group's."""
    made = network()
    assert made.auxiliary_adaptor is not None
    one, two = some(1), some(1)
    two[:, :3] += 1
    with torch.no_grad():
        (kept, whole), (other, changed) = made.auxiliary_adaptor(one), made.auxiliary_adaptor(two)
    assert torch.equal(kept[:, 2:], other[:, 2:]) and not torch.allclose(kept[:, :2], other[:, :2])
    assert not torch.allclose(whole, changed)


def test_the_config_is_restored_and_other_counts_are_refused() -> None:
    made = network()
    assert MSDConfig.from_json(made.config.as_json()) == made.config
    assert made.auxiliary_adaptor is not None
    with pytest.raises(UserError, match="auxiliary tokens"):
        made.auxiliary_adaptor(torch.zeros(1, GIVEN + 1, made.config.hidden))


@pytest.mark.parametrize("form", ["block", "ar"])
def test_auxiliary_tokens_never_change_the_output(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trees: list[list[int]] = []
    propose = MSD.propose

    def noted(*arguments: Any) -> DraftTree:
        tree = propose(*arguments)
        trees[-1] += tree.tokens.flatten().tolist()
        return tree

    monkeypatch.setattr(MSD, "propose", noted)
    drafter = MSD(network(form=form))
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=4, adaptive=False), drafter)
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(3)))
    L = inputs["input_ids"].shape[1]
    plain = MODEL.generate(**inputs, max_new_tokens=16, do_sample=False)[:, L:].tolist()
    for tokens in (None, some(3), some(3, without=2), lambda: some(3)):
        trees.append([])
        results = engine.generate(**inputs, auxiliary=tokens, max_new_tokens=16, do_sample=False)
        for row, result in enumerate(results):
            assert result.tokens == plain[row][: len(result.tokens)]
        seconds = results[0].statistics.seconds
        assert ("beside" in seconds) == ("beside_wait" in seconds) == callable(tokens)
    assert trees[1] == trees[3] and trees[0] != trees[1] != trees[2]


def test_an_error_of_the_function_reaches_the_caller() -> None:
    def broken() -> Tensor:
        raise UserError("no such recording")

    engine = SpeculativeVLM(MODEL, None, drafter=MSD(network()))
    with pytest.raises(UserError, match="no such recording"):
        engine.generate(**tiny.llava_inputs(1), auxiliary=broken, max_new_tokens=4, do_sample=False)


class Depth(np.ndarray):
    """A depth map [H, W] in metres: an input of a source that only this file knows."""


class DepthMSD(MSD):
    source = "depth"


def depth_map(seed: int) -> Depth:
    return np.random.default_rng(seed).random((16, 16)).view(Depth)


def depth_frames(depth: Depth, count: int) -> list[Image.Image]:
    """Slices of equal depth."""
    edges = np.linspace(0, 1, count + 1)
    slices = [(depth >= low) & (depth < high) for low, high in pairwise(edges)]
    return [Image.fromarray(np.asarray(part, np.uint8) * 255).convert("RGB") for part in slices]


@pytest.fixture
def depth(monkeypatch: pytest.MonkeyPatch) -> AuxiliarySource:
    auxiliary.get("events")  # the package's own sources are registered first
    monkeypatch.setattr(auxiliary, "_SOURCES", dict(auxiliary._SOURCES))
    source = AuxiliarySource("depth", "depth maps", (Depth,), lambda d: d, depth_frames, "reads no depth maps")
    auxiliary.register(source)
    return source


@pytest.mark.parametrize("lookup", [False, True])
def test_another_source_is_a_keyword_of_its_own(
    lookup: bool, depth: AuxiliarySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth maps, which the package does not know, change drafts through the target's vision tower, and no output."""
    processor = tiny_checkpoint.processor()
    model = tiny.llava(len(tiny_checkpoint.SPECIAL) + 256)
    torch.manual_seed(1)
    text = model.config.text_config
    made = MSDNetwork(
        MSDConfig.for_target(text, text.vocab_size, rank=4, parent_rank=8, auxiliary=((FRAMES, 2), (4, 2)))
    )
    made.heads.ids = torch.arange(text.vocab_size)
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    reader = DepthMSD(made.attach(model).eval())
    config = SpeculativeConfig(nodes=9, depth=4, adaptive=False)
    engine = SpeculativeVLM(model, processor, config, Repeats(reader) if lookup else reader)
    prompts, photos = ["What is near?", "And here?"], [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    plain = engine.with_method("ar").generate(photos, prompts, max_new_tokens=12, do_sample=False)
    encoded, encode = [], DepthMSD.encode
    monkeypatch.setattr(DepthMSD, "encode", lambda self, item: encoded.append(item) or encode(self, item))
    drafted = []
    for maps in ([None, None], [depth_map(0), None], [depth_map(0), depth_map(1)]):
        results = engine.generate(photos, prompts, depth=maps, max_new_tokens=12, do_sample=False)
        assert [r.tokens for r in results] == [r.tokens for r in plain]
        assert ("beside" in results[0].statistics.seconds) == any(m is not None for m in maps)
        drafted.append(len(encoded))
    assert drafted == [0, 1, 3]
    one = auxiliary.encoder(engine.drafter, "depth")
    assert one is not None and one(depth_map(0)).shape == (FRAMES + 4, text.hidden_size)
    assert (one(depth_map(0)) - one(depth_map(1))).abs().max() > 1e-4
    assert auxiliary.encoder(engine.drafter, "events") is None
    options = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(UserError, match="2 prompts but 1 depth maps"):
        engine.generate(photos, prompts, depth=depth_map(0), **options)
    with pytest.raises(UserError, match="give events or depth, not both"):
        engine.generate(photos, prompts, depth=[None, depth_map(0)], events=[None, None], **options)
    with pytest.raises(UserError, match="sees no events"):
        engine.generate(photos, prompts, events=[np.zeros(3), None], **options)
    with pytest.raises(UserError, match="method 'ar' reads no depth maps"):
        engine.with_method("ar").generate(photos[0], prompts[0], depth=depth_map(0), **options)


def test_sources_are_found_by_name() -> None:
    assert auxiliary.get("events").plural == "event recordings"
    with pytest.raises(UserError, match="unknown auxiliary source 'smell'; known: events"):
        auxiliary.get("smell")
