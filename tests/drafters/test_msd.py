"""The MSD drafter: its trees are trees within their budgets, subtrees come and go as the router says, output stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from msd.config import SpeculativeConfig
from msd.core import modality
from msd.core.layout import Layout
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork, Shape
from msd.drafters.algorithms.msd.drafter import choose
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import Memory
from msd.drafters.toolkit.growth import LevelCost, grow, reached
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget, Plan
from msd.targets import adapt
from msd.targets.teacher import run_teacher

FORMS = ["block", "ar"]
MODEL = tiny.llava()


def network(form: str = "block", seed: int = 0, **changes: Any) -> MSDNetwork:
    """Random in every part, what starts at zero included, and sharp enough to have opinions."""
    config = MSDConfig.for_target(MODEL.config.text_config, 60, form=form, rank=4, parent_rank=8, **changes)
    torch.manual_seed(seed)
    made = MSDNetwork(config)
    made.heads.ids = torch.arange(4, 64)
    with torch.no_grad():
        for p in made.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.3)
        made.heads.head.weight.mul_(4)
    return made.attach(MODEL).eval()


def memory(made: MSDNetwork, rows: int = 3) -> tuple[Memory, Layout]:
    """What decoding would remember of some prompts and one emitted token."""
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(rows)))
    teacher_batch = run_teacher(adapt(MODEL, made.config.taps), inputs, [[5, 6]] * rows)
    assert teacher_batch.taps is not None
    L = teacher_batch.prompt
    layout = replace(teacher_batch.layout, end=[L + 1] * rows)
    return Memory.begin(made, layout, teacher_batch.taps[:, :L]), layout


def tree(
    made: MSDNetwork,
    route: torch.Tensor,
    nodes: int,
    depth: list[int],
    width: int | None = None,
    temperature: float | None = None,
) -> DraftTree:
    remembered, layout = memory(made, len(route))
    context, anchors = remembered.upto(None)
    laws = made.levels(context, anchors, layout.newest())
    kinds = torch.tensor(made.config.modality_ids)
    subtrees = choose(made.config, route, nodes, width)
    return grow(laws, made.heads, subtrees, kinds, layout.newest(), Budget(nodes, depth), temperature)


def paths(drafted: DraftTree, row: int) -> list[tuple[int, ...]]:
    """Token paths of a row's nodes, and that the tree is one on the way."""
    found: list[tuple[int, ...]] = [()]
    for n in range(1, drafted.size):
        if bool(drafted.valid[row, n]):
            parent = int(drafted.parents[row, n])
            assert 0 <= parent < n
            assert bool(drafted.valid[row, parent])
            found.append((*found[parent], int(drafted.tokens[row, n])))
            assert int(drafted.depths[row, n]) == len(found[-1])
        else:
            found.append((-1,))
    return [p for p in found[1:] if p != (-1,)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_trees_keep_their_budgets(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    nodes = data.draw(st.integers(1, 24))
    depth = data.draw(st.lists(st.integers(0, 7), min_size=3, max_size=3))
    three = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)
    route = torch.tensor(data.draw(st.lists(three, min_size=3, max_size=3)))
    route = route / route.sum(-1, keepdim=True)
    drafted = tree(network(form, data.draw(st.integers(0, 3))), route, nodes, depth)
    assert drafted.height <= max(depth)
    for row, limit in enumerate(depth):
        found = paths(drafted, row)
        assert len(found) <= nodes
        assert len(set(found)) == len(found), "equal paths are one node"
        assert max(map(len, found), default=0) <= limit
        # what merging frees is filled again; the narrowest subtree alone has two nodes or more a level, down to level 4
        assert len(found) >= min(nodes, 2 * min(limit, 4))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_batch_draft_as_if_alone(form: str) -> None:
    made = network(form, active_from=0.0)
    route = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    together = tree(made, route, 9, [5, 5, 5])
    first = tree(made, route[:1], 9, [5])
    assert sorted(paths(together, 0)) == sorted(paths(first, 0))


def test_dynamic_selection() -> None:
    made = network(active_from=0.2)
    sure = choose(made.config, torch.tensor([[0.95, 0.03, 0.02]]), 10)
    assert sure.shapes == [made.config.within(made.config.shapes["language"])]
    assert sure.budget.tolist() == [[10]]
    torn = choose(made.config, torch.tensor([[0.5, 0.1, 0.4]]), 10)
    assert torn.shapes == [made.config.within(made.config.shapes[n]) for n in ("language", "fusion")]
    assert torn.budget.sum() == 10
    assert torn.budget[0, 0] > torn.budget[0, 1] > 0
    rows = choose(made.config, torch.tensor([[0.95, 0.03, 0.02], [0.03, 0.95, 0.02]]), 10)
    assert rows.budget.tolist() == [[10, 0], [0, 10]]
    always = choose(network(dynamic=False).config, torch.tensor([[0.95, 0.03, 0.02]]), 10)
    assert len(always.shapes) == 3
    shared = choose(network(subtrees=False).config, torch.tensor([[0.5, 0.1, 0.4]]), 10)
    assert shared.budget.tolist() == [[10]]
    assert shared.weights[0, 0].tolist() == pytest.approx([0.5, 0.1, 0.4])


def test_subtrees_have_their_own_shape_and_expert() -> None:
    shapes = {"language": Shape(1, 6), "vision": Shape(5, 1), "fusion": Shape(2, 3)}
    made = network(shapes=shapes)
    deep = tree(made, torch.tensor([[1.0, 0.0, 0.0]]), 6, [6])
    assert [len(p) for p in paths(deep, 0)] == [1, 2, 3, 4, 5, 6]
    wide = tree(made, torch.tensor([[0.0, 1.0, 0.0]]), 5, [6])
    assert [len(p) for p in paths(wide, 0)] == [1] * 5
    assert wide.modality[0, 1:].tolist() == [modality.get("vision").id] * 5
    assert {p[0] for p in paths(deep, 0)} != {p[0] for p in paths(wide, 0)}  # other experts, other words
    chain = tree(made, torch.tensor([[0.3, 0.4, 0.3]]), 5, [5], width=1)
    assert [len(p) for p in paths(chain, 0)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", FORMS)
def test_scores_follow_the_draft_laws(form: str) -> None:
    """A node's q is its token's probability under the law of its parent, computed anew along the node's own path."""
    made = network(form)
    route = torch.tensor([[0.0, 0.0, 1.0]])
    drafted = tree(made, route, 8, [4])
    assert drafted.q is not None
    remembered, layout = memory(made, 1)
    context, anchors = remembered.upto(None)
    for n in range(1, drafted.size):
        path = []
        at = n
        while at:
            path.append(int(drafted.tokens[0, at]))
            at = int(drafted.parents[0, at])
        laws = made.levels(context, anchors, layout.newest())
        law = laws.root(route[:, None])
        for token in path[:0:-1]:
            law = laws.below(torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.long))
        q = law.logits[0, 0].softmax(-1)[made.heads.ids.tolist().index(path[0])]
        assert float(drafted.q[0, n]) == pytest.approx(float(q), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", [(), ("router", "experts", "subtrees", "vision", "transfer", "dynamic"), ("transfer",)])
def test_output_is_the_targets(form: str, off: tuple[str, ...]) -> None:
    made = network(form, **dict.fromkeys(off, False))
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=5), MSD(made))
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 3, words=5 + s) for s in range(3)))
    L = inputs["input_ids"].shape[1]
    plain = MODEL.generate(**inputs, max_new_tokens=20, do_sample=False)[:, L:].tolist()
    for row, result in enumerate(engine.generate(**inputs, max_new_tokens=20, do_sample=False)):
        assert result.tokens == plain[row][: len(result.tokens)]
        assert result.finish == "length" or result.tokens[-1] == tiny.EOS
    one = tiny.llava_inputs(1)
    torch.manual_seed(5)
    drawn = MODEL.generate(**one, max_new_tokens=20, do_sample=True, temperature=0.8)[0, one["input_ids"].shape[1] :]
    seeded = engine.generate(**one, max_new_tokens=20, do_sample=True, temperature=0.8, seed=5)
    assert seeded.tokens == drawn.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_drafter_that_knows_is_accepted(form: str) -> None:
    """Sampled candidates: drafts drawn from a good law are accepted, and the output is still one of the target's."""
    made = network(form)
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=3), MSD(made, sampled=True))
    inputs = tiny.batch(tiny.llava_inputs(0), tiny.llava_inputs(1, images=0))
    results = engine.generate(**inputs, max_new_tokens=12, do_sample=True, seed=1)
    assert all(0 < len(r.tokens) <= 12 for r in results)
    again = engine.generate(**inputs, max_new_tokens=12, do_sample=True, seed=1)
    assert [r.tokens for r in results] == [r.tokens for r in again]


def test_saved_and_loaded_strictly(tmp_path: Any) -> None:
    made = network("ar")
    checkpoint.save(made, tmp_path / "d", {"answers": 3})
    again = registry.load(tmp_path / "d")
    assert again.config == made.config
    for name, value in made.state_dict().items():
        assert torch.allclose(again.state_dict()[name].float(), value.float(), atol=1e-2), name
    assert checkpoint.training(tmp_path / "d") == {"answers": 3}
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "d" / "model.safetensors")
    for broken, said in (
        ({k: v for k, v in tensors.items() if k != "fc.weight"}, "'fc.weight' is missing"),
        (tensors | {"more": torch.zeros(1)}, "'more' is unknown"),
        (tensors | {"fc.weight": torch.zeros(2, 2)}, "'fc.weight' has shape"),
    ):
        save_file(broken, tmp_path / "d" / "model.safetensors")
        with pytest.raises(UserError, match=said):
            registry.load(tmp_path / "d")
    with pytest.raises(UserError, match=r"has no config\.json"):
        registry.load(tmp_path / "none")


def test_a_foreign_target_is_refused() -> None:
    made = network()
    with pytest.raises(UserError, match="was trained for a target with 64 tokens"):
        SpeculativeVLM(tiny.llava(vocab=70), None, None, MSD(made))


def test_a_new_modality_needs_one_call() -> None:
    """Registered in this file alone, it gets an expert, a subtree, labels in the tree and a threshold."""
    thermal = modality.register("thermal", 0.55)
    shapes = MSDConfig.for_target(MODEL.config.text_config, 60).shapes | {"thermal": Shape(3, 2)}
    made = network(modalities=("language", "vision", "fusion", "thermal"), shapes=shapes)
    drafted = tree(made, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 6, [6])
    assert int(drafted.modality[0, 1]) == thermal.id
    assert drafted.height == 2
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=6, depth=4), MSD(made))
    inputs = tiny.llava_inputs(0)
    plain = MODEL.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert engine.generate(**inputs, max_new_tokens=12, do_sample=False).tokens == plain


def test_plan_counts_as_chain() -> None:
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=5, depth=5), MSD(network()))
    engine.plan = Plan(nodes=5, depth=5, width=1)
    result = engine.generate(**tiny.llava_inputs(0), max_new_tokens=20, do_sample=False)
    assert result.statistics.num_draft_tokens <= 5 * result.statistics.num_spec_steps


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_network_drafts_the_same(form: str) -> None:
    """Packed products and attention of one anchor against the plain ones, which training runs."""
    plain, packed = network(form), network(form)
    packed.pack()
    route = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])
    with torch.inference_mode():
        one, other = tree(plain, route, 8, [4, 3]), tree(packed, route, 8, [4, 3])
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
    assert one.q is not None and other.q is not None
    torch.testing.assert_close(one.q, other.q, atol=1e-5, rtol=1e-4)
    with torch.enable_grad():
        trained = tree(packed, route, 8, [4, 3])
    torch.testing.assert_close(trained.q, one.q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_drafts_are_nearly_the_same(form: str) -> None:
    plain, half = network(form), network(form)
    half.pack(torch.bfloat16)
    route = torch.tensor([[0.3, 0.4, 0.3]])
    with torch.inference_mode():
        one, other = tree(plain, route, 8, [4]), tree(half, route, 8, [4])
    first = [
        {int(t): float(q) for t, q, d in zip(x.tokens[0], x.q[0], x.depths[0], strict=True) if d == 1}
        for x in (one, other)
        if x.q is not None
    ]
    both = first[0].keys() & first[1].keys()
    assert both and all(first[0][t] == pytest.approx(first[1][t], rel=0.05) for t in both)
    assert any(first[0][t] != first[1][t] for t in both)


@pytest.mark.parametrize("form", FORMS)
def test_what_greedy_decoding_chooses_ranks_greedy_trees_alone(form: str) -> None:
    """A request that samples takes a node with the chance q, whatever was calibrated on greedy answers."""
    plain, calibrated = network(form), network(form)
    calibrated.heads.calibration.copy_(torch.tensor([0.2, 0.3, 2.0]))
    route = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])
    with torch.inference_mode():
        by_q = tree(plain, route, 9, [4, 4])
        sampled = tree(calibrated, route, 9, [4, 4], temperature=1.0)
        greedy = tree(calibrated, route, 9, [4, 4])
    assert torch.equal(by_q.tokens, sampled.tokens) and torch.equal(by_q.parents, sampled.parents)
    assert not (by_q.tokens.shape == greedy.tokens.shape and torch.equal(by_q.parents, greedy.parents))


@pytest.mark.parametrize("form", FORMS)
def test_levels_end_where_they_no_longer_pay(form: str) -> None:
    """Free levels are all drafted, dear ones not, and nothing is timed without a plan that counts seconds."""
    made = network(form)
    route = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])
    remembered, layout = memory(made, 2)
    context, anchors = remembered.upto(None)
    kinds, subtrees = torch.tensor(made.config.modality_ids), choose(made.config, route, 12)
    heights = {}
    for cost in (0.0, 1e-4, 1e9):
        pace = LevelCost()
        for passes in (None, (1.0,) * 13):
            pace.level = cost
            laws, budget = made.levels(context, anchors, layout.newest()), Budget(12, [4, 4], passes=passes)
            with torch.inference_mode():
                heights[cost, passes is None] = grow(
                    laws, made.heads, subtrees, kinds, layout.newest(), budget, None, pace
                ).height
            assert (pace.level == cost) == (passes is None or cost == 1e9)
    assert heights[1e9, False] == 1 and heights[0.0, False] > 1
    assert len({h for (_, untimed), h in heights.items() if untimed}) == 1


def test_a_level_pays_by_what_it_is_expected_to_give() -> None:
    pace = LevelCost()
    pace.level = 0.003
    assert pace.pays(before=0.5, reach=0.25, token=0.03, node=0.0)  # 0.125 tokens, 3.75 ms
    assert not pace.pays(before=0.5, reach=0.2, token=0.03, node=0.0)  # 0.08 tokens, 2.4 ms
    assert not pace.pays(before=0.5, reach=0.25, token=0.03, node=0.002)  # a large batch: the pass is longer by 2 ms
    score = torch.tensor([[0.5, 0.25, 0.5, 1e-30], [0.1, 0.1, 0.1, 0.1]]).log()
    assert reached(score, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), 2) == pytest.approx((0.75 + 0.3) / 2)


def test_folders_that_ship_are_methods_for_the_reference_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("msd", "msd-ar"):
        checkpoint.save(network(), tmp_path / name, {"thresholds": {"0.01": {"vision": 0.9}}})
    monkeypatch.setattr(registry, "ROOTS", (tmp_path,))
    found = {"msd", "msd:sampled", "msd:ar"}
    assert found <= set(registry.methods()) and not found & set(registry.methods("other/target"))
    one, other = registry.create("msd"), registry.create("msd:sampled")
    assert isinstance(one, MSD) and isinstance(other, MSD) and one.network is other.network
    assert other.sampled and not one.sampled and one.thresholds(0.01) == {"vision": 0.9}
    registry.register_folder(tmp_path / "msd")  # one's own takes its place, for any target
    assert {"msd", "msd:sampled"} <= set(registry.methods("other/target"))


def test_a_model_is_drafted_for_by_what_was_trained_for_it(reference_model: tuple[Any, Any]) -> None:
    from msd.targets.registry import fingerprint

    model, processor = reference_model
    assert registry.default(fingerprint(model)) == "msd+prompt-lookup"
    assert SpeculativeVLM(model, processor).drafter.name == "msd+prompt-lookup"
    assert registry.default("llava-another") == "prompt-lookup"
    assert SpeculativeVLM(MODEL, None).drafter.name == "prompt-lookup"
    assert SpeculativeVLM(model, processor, drafter="ar").drafter.name == "ar"
