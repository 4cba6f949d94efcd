"""Requests that join and leave a running batch answer as if each were alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

import rivals
import tiny
from families import BY_NAME
from msd import drafters
from msd.config import SpeculativeConfig
from msd.core.layout import Layout
from msd.core.modality import known
from msd.decode import Engine
from msd.drafters.algorithms.combined import Combined
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.costs import Costs
from msd.planning.plan import Plan
from msd.serve.batch import Batch
from random_drafter import RandomDrafter
from serve import batches
from serve.batches import alone, served

ALWAYS = SpeculativeConfig(adaptive=False)  # how much is drafted must not depend on the clock
MODEL = tiny.llava(sharpness=10.0)
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 24},
    {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_new_tokens": 9},
    {"do_sample": True, "repetition_penalty": 1.3, "top_k": 20, "max_new_tokens": 16},
    {"encoder_no_repeat_ngram_size": 2, "max_new_tokens": 1},
    {"do_sample": True, "min_new_tokens": 10, "max_new_tokens": 30},
    {"no_repeat_ngram_size": 3, "max_new_tokens": 12},
]


def network(model: Any) -> MSDNetwork:
    torch.manual_seed(3)
    config = MSDConfig.for_target(model.config.get_text_config(), 60, rank=4, parent_rank=8)
    return MSDNetwork(config).attach(model).eval()


def made(method: str) -> Any:
    """A drafter, with random parameters if it has any."""
    if method == "msd+eagle3":
        return Combined(rivals.network(MODEL, "eagle3"), network(MODEL))
    if method.startswith("msd"):
        drafter = MSD(network(MODEL))
        return Repeats(drafter, 2) if method == "msd+prompt-lookup" else drafter
    if method in rivals.RIVALS:
        return TrainedDrafter(rivals.network(MODEL, method))
    return drafters.create(method)


@pytest.mark.parametrize("method", ["ar", "prompt-lookup", "msd", "msd+prompt-lookup", "msd+eagle3"])
def test_answers_are_those_of_generate(method: str) -> None:
    requests = [
        (tiny.llava_inputs(i, images=i % 3, words=6 + 5 * (i % 4)), OPTIONS[i % len(OPTIONS)]) for i in range(8)
    ]
    wanted = [alone(MODEL, inputs, i, options) for i, (inputs, options) in enumerate(requests)]
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, made(method))
    assert vlm.engine.joins
    for most in (3, 6) if method == "prompt-lookup" else (4,):
        answers, accepted = served(vlm, requests, random.Random(most), most)
        assert answers == wanted
        assert accepted > 3 or method != "prompt-lookup"  # the other drafters' parameters are random


@pytest.mark.parametrize(
    "method", ["prompt-lookup", "msd", "msd+prompt-lookup", "msd+eagle3", "dspark", "specvlm", "vispec"]
)
def test_drafts_are_those_that_a_request_gets_alone(method: str) -> None:
    requests = [(tiny.llava_inputs(i, images=i % 3, words=6 + 5 * (i % 4)), {"max_new_tokens": 9}) for i in range(6)]
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, made(method))
    single, common = (batches.drafts(vlm, requests, most)[0] for most in (1, 4))
    assert max(map(len, common.values())) > 2
    assert len(common.keys() & single.keys()) > 20
    for text in common.keys() & single.keys():
        drafted, wanted = common[text], single[text]
        if method == "msd+prompt-lookup":  # it cuts the trees of lookups to the size of the others
            drafted, wanted = (x[: min(len(drafted), len(wanted))] for x in (drafted, wanted))
        assert drafted == wanted


def test_drafts_are_counted_by_the_modality_of_their_subtrees(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, made("msd"))
    batch: Batch[int] = Batch(vlm.engine)
    steps: list[Any] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda *given: steps.append(step(*given)) or steps[-1])
    for i in range(2):
        batch.join(i, vlm.prefill(tiny.llava_inputs(i, images=1 + i), max_new_tokens=12, eos_token_id=None))
    emitted = []
    while batch.members:
        emitted += batch.step()
    drafted, accepted = (sum((getattr(e, n) for _, e in emitted), start=Counter()) for n in ("drafted", "accepted"))
    assert len(drafted) > 1
    for kind in known():
        wanted = sum(int(((s.tree.modality == kind.id) & s.tree.valid)[:, 1:].sum()) for s in steps)
        assert drafted[kind.name] == wanted
    assert accepted.total() == sum(len(nodes) for s in steps for nodes in s.accepted.nodes)
    assert accepted <= drafted


def test_less_is_drafted_the_more_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over up to nine nodes costs the same, so one row drafts for nothing; nine rows have no room to draft."""
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, made("msd"))
    vlm.engine.plan.costs = Costs((1, 9, 33), (100, 200), ((1.0, 1.0, 9.0), (1.0, 1.0, 9.0)))
    monkeypatch.setattr(Plan, "learn", lambda *_: None)  # budgets must not depend on the clock
    nodes: dict[int, float] = {}
    for rows in (1, 3, 9):
        batch: Batch[int] = Batch(vlm.engine)
        for i in range(rows):
            batch.join(i, vlm.prefill(tiny.llava_inputs(1), max_new_tokens=24, eos_token_id=None))
        emitted = []
        while batch.members:
            emitted += batch.step()
        nodes[rows] = sum(emission.drafted.total() for _, emission in emitted) / len(emitted)
    assert nodes[1] > nodes[3] > nodes[9] == 0


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_5", "llama4", "gemma4", "mistral3_window"])
def test_target_families(name: str) -> None:
    """Positions on three axes, images seen both ways, windows, chunks, recurrent states, head sizes by layer."""
    family = BY_NAME[name]
    model = family.make()
    rows = [family.row(family.parts(i, family.kinds[:1] * (1 + i % 2), words=8 + 4 * i)) for i in range(4)]
    requests = [(row, {"max_new_tokens": 8 + 3 * i, "eos_token_id": None}) for i, row in enumerate(rows)]
    wanted = [alone(model, inputs, i, options) for i, (inputs, options) in enumerate(requests)]
    answers, _ = served(SpeculativeVLM(model, None, ALWAYS, "prompt-lookup"), requests, random.Random(5))
    assert answers == wanted


def test_a_member_that_is_ended_leaves_at_once_and_disturbs_nobody() -> None:
    requests = [(tiny.llava_inputs(i, words=6 + 3 * i), {"max_new_tokens": 20, "eos_token_id": None}) for i in range(3)]
    wanted = [alone(MODEL, inputs, 0, options) for inputs, options in requests]
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, "prompt-lookup")
    batch: Batch[int] = Batch(vlm.engine)
    answers = [batch.join(i, vlm.prefill(inputs, **options)).tokens for i, (inputs, options) in enumerate(requests)]
    for number, emission in batch.step():
        answers[number] += emission.tokens
    batch.end([1], "cancelled")
    assert batch.members == [0, 2]
    while batch.members:
        for number, emission in batch.step():
            answers[number] += emission.tokens
    assert [answers[0], answers[2]] == [wanted[0], wanted[2]]
    assert answers[1] == wanted[1][: len(answers[1])]
    assert batch.bytes_with(100) == 0


def test_a_nan_of_one_request_does_not_reach_another() -> None:
    """Masked slots are multiplied by 0, and 0 · NaN is NaN, so slots that change hands are cleared."""
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, "ar")
    short = tiny.llava_inputs(1, words=4), {"max_new_tokens": 20, "eos_token_id": None}
    long = tiny.llava_inputs(2, images=2, words=20), {"max_new_tokens": 4, "eos_token_id": None}
    wanted = alone(MODEL, short[0], 0, short[1])
    batch: Batch[str] = Batch(vlm.engine)
    request = vlm.prefill(long[0], **long[1])
    with torch.inference_mode():
        for layer in request.state.cache.layers:
            layer.values[:, :, 20:] = torch.nan  # type: ignore[index]
    batch.join("keeper", vlm.prefill(long[0], **{**long[1], "max_new_tokens": 30}))
    batch.join("broken", request)
    batch.step()
    answer = batch.join("short", vlm.prefill(short[0], **short[1])).tokens
    while batch.members:
        answer += [token for name, emission in batch.step() if name == "short" for token in emission.tokens]
    assert answer == wanted


def test_memory_grows_with_rows_and_is_known_before() -> None:
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, "ar")
    batch: Batch[int] = Batch(vlm.engine)
    batch.join(0, vlm.prefill(tiny.llava_inputs(1), max_new_tokens=20, eos_token_id=None))
    slots = tiny.llava_inputs(1)["input_ids"].shape[1] + 20 + ALWAYS.nodes + 1
    text = MODEL.config.text_config
    slot = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert batch.bytes_with(10) == 2 * slots * slot
    assert batch.bytes_with(2 * slots, rows=3) == 4 * 2 * slots * slot


@pytest.mark.parametrize("settings, method", [({"verifier": "budget", "epsilon": 0.1}, "ar"), ({}, "random")])
def test_what_cannot_join_is_served_alone(settings: dict[str, Any], method: str) -> None:
    drafter = RandomDrafter(1, 64) if method == "random" else method
    vlm = SpeculativeVLM(MODEL, None, SpeculativeConfig(**settings), drafter)
    requests = [(tiny.llava_inputs(i), {"max_new_tokens": 8}) for i in range(3)]
    batch: Batch[int] = Batch(vlm.engine)
    batch.join(0, vlm.prefill(requests[0][0], max_new_tokens=8, eos_token_id=None))
    assert not batch.open
    answers, _ = served(vlm, requests, random.Random(1))
    assert answers == [alone(MODEL, inputs, 0, options) for inputs, options in requests]
    if method == "random":
        state = vlm.prefill(requests[0][0], max_new_tokens=8).state
        with pytest.raises(UserError, match="'random' cannot change the rows"):
            vlm.engine.join(state, state)


def test_prompts_stay_unread_until_a_draft_needs_them() -> None:
    drafter, read, after = MSD(network(MODEL)), list[int](), list[int]()
    vlm = SpeculativeVLM(MODEL, None, ALWAYS, drafter)
    nodes, batch = vlm.plan.nodes, Batch[int](vlm.engine)
    original = drafter.network.read

    def counted(layout: Layout, *others: Any) -> Any:
        read.append(layout.batch)
        return original(layout, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafter.network, "read", counted)
        for number, drafting in enumerate([False, False, True, False, True]):
            vlm.plan.nodes = nodes if drafting else 0
            batch.join(number, vlm.prefill(tiny.llava_inputs(number, words=6 + number), [number], max_new_tokens=40))
            batch.step()
            after.append(sum(read))
    assert after == [0, 0, 3, 3, 5]
