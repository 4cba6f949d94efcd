"""The MSD drafter: trees keep their budgets, the router chooses the subtrees, and the output is the target's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from msd.backends.packed import multiplies_in_bf16, rounds
from msd.config import SpeculativeConfig
from msd.core import modality
from msd.core.foresight import Outlook
from msd.core.layout import Layout
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD, SWITCHES, MSDConfig, MSDNetwork, Shape
from msd.drafters.algorithms.msd.drafter import choose_subtrees
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import Memory
from msd.drafters.toolkit.growth import grow
from msd.drafters.toolkit.layers import Seen
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.selection import budgets
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget, Plan
from msd.targets import adapt
from msd.targets.teacher import run_teacher

FORMS = ["block", "ar"]
MODEL = tiny.llava()


def network(form: str = "block", seed: int = 0, **changes: Any) -> MSDNetwork:
    """A network with random weights everywhere, zero-initialised ones included, and peaked distributions.

    It has all parts unless `changes` leave some out.
    """
    changes = dict.fromkeys(SWITCHES, True) | changes
    config = MSDConfig.for_target(MODEL.config.text_config, 60, form=form, rank=4, parent_rank=8, **changes)
    torch.manual_seed(seed)
    net = MSDNetwork(config)
    net.heads.ids = torch.arange(4, 64)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.3)
        net.heads.head.weight.mul_(4)
    return net.attach(MODEL).eval()


def memory(net: MSDNetwork, rows: int = 3) -> tuple[Memory, Layout]:
    """The memory that decoding has after some prompts and one emitted token."""
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(rows)))
    teacher_batch = run_teacher(adapt(MODEL, net.config.taps), inputs, [[5, 6]] * rows)
    L = teacher_batch.prompt
    layout = replace(teacher_batch.layout, end=[L + 1] * rows)
    return Memory.begin(net, layout, teacher_batch.taps[:, :L]), layout


def tree(
    net: MSDNetwork,
    route: torch.Tensor,
    nodes: int,
    depth: list[int],
    width: int | None = None,
    outlook: Any = None,
    separate: bool = True,
) -> DraftTree:
    decoding_memory, layout = memory(net, len(route))
    anchors = decoding_memory.anchors()
    levels = net.levels(anchors, layout.newest())
    subtrees = choose_subtrees(net.config, route, width, separate)
    return grow(levels, net, subtrees, net.config.modality_ids, layout.newest(), Budget(nodes, depth), outlook)


def paths(drafted: DraftTree, row: int) -> list[tuple[int, ...]]:
    """Returns the token paths of a row's nodes; asserts that they form a tree."""
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
        # merging fills freed nodes again; the narrowest subtree alone has two nodes or more per level, down to level 4
        assert len(found) >= min(nodes, 2 * min(limit, 4))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_batch_draft_as_if_alone(form: str) -> None:
    net = network(form, active_from=0.0)
    route = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    together = tree(net, route, 9, [5, 5, 5])
    first = tree(net, route[:1], 9, [5])
    assert sorted(paths(together, 0)) == sorted(paths(first, 0))


def test_dynamic_selection() -> None:
    def nodes(net: MSDNetwork, *route: list[float]) -> list[list[int]]:
        return [budgets(share, 10) for share in choose_subtrees(net.config, torch.tensor(route)).share.tolist()]

    net = network(active_from=0.2)
    assert nodes(net, [0.95, 0.03, 0.02], [0.03, 0.95, 0.02]) == [[10, 0, 0], [0, 10, 0]]
    assert nodes(net, [0.5, 0.1, 0.4]) == [[6, 0, 4]]  # 5.6 and 4.4
    assert nodes(net, [0.12, 0.5, 0.38]) == [[0, 6, 4]]
    assert nodes(network(active_from=0.9), [0.3, 0.4, 0.3]) == [[0, 10, 0]]  # the largest, where none reaches it
    assert nodes(network(dynamic=False), [0.8, 0.14, 0.06]) == [[8, 1, 1]]
    chosen = choose_subtrees(net.config, torch.tensor([[0.5, 0.1, 0.4]]))
    assert chosen.shapes == [net.config.within(net.config.shapes[n]) for n in net.config.modalities]
    shared = choose_subtrees(network(subtrees=False).config, torch.tensor([[0.5, 0.1, 0.4]]))
    assert budgets(shared.share[0].tolist(), 10) == [10]
    assert shared.weights[0, 0].tolist() == pytest.approx([0.5, 0.1, 0.4])


def test_subtrees_have_their_own_shape_and_expert() -> None:
    shapes = {"language": Shape(1, 6), "vision": Shape(5, 1), "fusion": Shape(2, 3)}
    net = network(shapes=shapes)
    deep = tree(net, torch.tensor([[1.0, 0.0, 0.0]]), 6, [6])
    assert [len(p) for p in paths(deep, 0)] == [1, 2, 3, 4, 5, 6]
    wide = tree(net, torch.tensor([[0.0, 1.0, 0.0]]), 5, [6])
    assert [len(p) for p in paths(wide, 0)] == [1] * 5
    assert wide.modality[0, 1:].tolist() == [modality.get("vision").id] * 5
    assert {p[0] for p in paths(deep, 0)} != {p[0] for p in paths(wide, 0)}  # other experts, other tokens
    chain = tree(net, torch.tensor([[0.3, 0.4, 0.3]]), 5, [5], width=1)
    assert [len(p) for p in paths(chain, 0)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", FORMS)
def test_node_q_is_the_draft_probability(form: str) -> None:
    """A node's q is its token's probability below its parent, recomputed along the node's path."""
    net = network(form)
    route = torch.tensor([[0.0, 0.0, 1.0]])
    drafted = tree(net, route, 8, [4])
    assert drafted.q is not None
    decoding_memory, layout = memory(net, 1)
    anchors = decoding_memory.anchors()
    for n in range(1, drafted.size):
        path = []
        at = n
        while at:
            path.append(int(drafted.tokens[0, at]))
            at = int(drafted.parents[0, at])
        levels = net.levels(anchors, layout.newest())
        distribution = levels.root(route[:, None])
        for token in path[:0:-1]:
            distribution = levels.below(torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.long))
        q = distribution.logits[0, 0].softmax(-1)[net.heads.ids.tolist().index(path[0])]
        assert float(drafted.q[0, n]) == pytest.approx(float(q), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", [(), SWITCHES, ("transfer",), ("experts",), ("readout",)])
def test_output_is_the_targets(form: str, off: tuple[str, ...]) -> None:
    net = network(form, **dict.fromkeys(off, False))
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=5), MSD(net))
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
def test_sampled_candidates_are_reproducible(form: str) -> None:
    """With sampled candidates every row emits tokens, and the seed determines them."""
    net = network(form)
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=3), MSD(net, sampled=True))
    inputs = tiny.batch(tiny.llava_inputs(0), tiny.llava_inputs(1, images=0))
    results = engine.generate(**inputs, max_new_tokens=12, do_sample=True, seed=1)
    assert all(0 < len(r.tokens) <= 12 for r in results)
    again = engine.generate(**inputs, max_new_tokens=12, do_sample=True, seed=1)
    assert [r.tokens for r in results] == [r.tokens for r in again]


def test_saved_and_loaded_strictly(tmp_path: Any) -> None:
    net = network("ar")
    checkpoint.save(net, tmp_path / "d", {"answers": 3})
    again = registry.load(tmp_path / "d")
    assert again.config == net.config
    for name, value in net.state_dict().items():
        assert torch.allclose(again.state_dict()[name].float(), value.float(), atol=1e-2), name
    assert checkpoint.training(tmp_path / "d") == {"answers": 3}
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "d" / "model.safetensors")
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != "fc.weight"}, "'fc.weight' is missing"),
        (tensors | {"more": torch.zeros(1)}, "'more' is unknown"),
        (tensors | {"fc.weight": torch.zeros(2, 2)}, "'fc.weight' has shape"),
    ):
        save_file(broken, tmp_path / "d" / "model.safetensors")
        with pytest.raises(UserError, match=message):
            registry.load(tmp_path / "d")
    with pytest.raises(UserError, match="there is no folder"):
        registry.load(tmp_path / "none")


@pytest.mark.parametrize("form", FORMS)
def test_without_experts_nodes_have_the_modality_of_their_first_token(form: str) -> None:
    """Only a mixture of experts needs a route at each node; the route does not change the distributions then."""
    route = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.1, 0.7]])
    net = network(form, experts=False)
    with torch.inference_mode():
        drafted, other = (tree(net, weights, 9, [4, 4], separate=False) for weights in (route, route.flip(1)))
    assert drafted.height > 1 and torch.equal(drafted.tokens, other.tokens)
    for row, name in enumerate(("vision", "fusion")):
        nodes = drafted.valid[row] & (drafted.parents[row] >= 0)
        assert set(drafted.modality[row][nodes].tolist()) == {modality.get(name).id}


@pytest.mark.parametrize("form", FORMS)
def test_a_read_out_reads_the_image_tokens_of_its_row(form: str) -> None:
    """Rows without an image, and a closed gate, leave the draft as it is without a read-out."""
    net = network(form, vision=False)
    decoding_memory, layout = memory(net)  # the second of three rows has an image
    anchors = decoding_memory.anchors()
    seen = anchors.seen
    assert seen is not None and seen.mask.sum(1).tolist() == [1, 1 + int((layout.modality[1] != 0).sum()), 1]
    weights = torch.full((3, 1, 3), 1 / 3)

    def root(keys: Seen | None) -> torch.Tensor:
        with torch.inference_mode():
            return net.levels(replace(anchors, seen=keys), layout.newest()).root(weights).logits[:, 0]

    with_image, without = root(seen), root(None)
    other = root(replace(seen, values=seen.values.roll(1, -1)))
    changed = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(with_image, without, strict=True)]
    assert changed == [False, True, False] and not torch.allclose(with_image[1], other[1], atol=1e-5)
    assert torch.allclose(root(seen.of([0, 1]).joined(seen.of([2]))), with_image, atol=1e-6)
    with torch.no_grad():
        net.readout.gate.zero_()
    assert torch.allclose(root(seen), without)


def test_a_foreign_target_is_refused() -> None:
    net = network()
    with pytest.raises(UserError, match="was trained for a target with 64 tokens"):
        SpeculativeVLM(tiny.llava(vocab=70), None, None, MSD(net))


def test_a_new_modality_needs_one_call() -> None:
    """A modality registered only in this test gets an expert, a subtree, labels in the tree and a threshold."""
    thermal = modality.register("thermal", 0.55)
    shapes = MSDConfig.for_target(MODEL.config.text_config, 60).shapes | {"thermal": Shape(3, 2)}
    net = network(modalities=("language", "vision", "fusion", "thermal"), shapes=shapes)
    drafted = tree(net, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 6, [6])
    assert int(drafted.modality[0, 1]) == thermal.id
    assert drafted.height == 2
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=6, depth=4), MSD(net))
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
    """Compares packed products and single-anchor attention with the plain ones, which training runs."""
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
@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, multiplies_in_bf16()), (torch.float16, rounds())])
def test_rounded_drafts_are_nearly_the_same(form: str, dtype: torch.dtype, has: bool) -> None:
    """Compares nodes of the same token and subtree: subtrees draft a token with their own q, and rounding may decide
    which of them has it."""
    if not has:
        pytest.skip("this CPU has no such products")
    plain, half = network(form), network(form)
    half.pack(dtype)
    route = torch.tensor([[0.3, 0.4, 0.3]])
    with torch.inference_mode():
        one, other = tree(plain, route, 8, [4]), tree(half, route, 8, [4])
    first = []
    for drafted in (one, other):
        assert drafted.q is not None and drafted.modality is not None
        nodes = zip(drafted.tokens[0], drafted.modality[0], drafted.q[0], drafted.depths[0], strict=True)
        first.append({(int(t), int(m)): float(q) for t, m, q, d in nodes if d == 1})
    both = first[0].keys() & first[1].keys()
    assert len(both) >= 4 and all(first[0][node] == pytest.approx(first[1][node], rel=0.05) for node in both)
    assert any(first[0][node] != first[1][node] for node in both)


@pytest.mark.parametrize("form", FORMS)
def test_calibration_ranks_greedy_trees_only(form: str) -> None:
    """A request that samples accepts a node with probability q, so the calibration on greedy answers has no effect."""
    plain, calibrated = network(form), network(form)
    calibrated.heads.calibration.copy_(torch.tensor([0.2, 0.3, 2.0]))
    route = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])
    with torch.inference_mode():
        by_q = tree(plain, route, 9, [4, 4])
        sampled = tree(calibrated, route, 9, [4, 4], outlook=lambda levels: Outlook(lambda logits: logits))
        greedy = tree(calibrated, route, 9, [4, 4])
    assert torch.equal(by_q.tokens, sampled.tokens) and torch.equal(by_q.parents, sampled.parents)
    assert not (by_q.tokens.shape == greedy.tokens.shape and torch.equal(by_q.parents, greedy.parents))


@pytest.mark.parametrize("form", FORMS)
def test_levels_that_do_not_pay_are_not_drafted(form: str) -> None:
    """Where a token costs much time, or nothing is known, all are; they are timed only if the plan measures seconds."""
    net = network(form)
    route = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])
    decoding_memory, layout = memory(net, 2)
    anchors = decoding_memory.anchors()
    subtrees, ids = choose_subtrees(net.config, route), net.config.modality_ids
    heights: dict[float, list[int]] = {}
    for token_seconds in (1e9, 1e-9):
        cost = LevelCost()
        for passes in (*[(token_seconds,) * 13] * 3, None):
            levels, budget = net.levels(anchors, layout.newest()), Budget(12, [4, 4], passes=passes)
            before = cost.seconds
            with torch.inference_mode():
                drafted = grow(levels, net, subtrees, ids, layout.newest(), budget, None, cost)
            heights.setdefault(token_seconds, []).append(drafted.height)
            assert passes is not None or cost.seconds == before
    assert heights[1e9] == heights[1e9][:1] * 4 and heights[1e9][0] > 1
    # the first draft is not timed, so the third one is the first for which the seconds of a level are known
    assert heights[1e-9] == [*heights[1e9][:2], 1, heights[1e9][0]]


def test_a_level_pays_if_its_expected_tokens_save_more_time_than_it_costs() -> None:
    cost = LevelCost()
    assert cost.levels(5, 0.03, 0.0) == 5  # nothing is known
    cost.learn([0.5, 0.25], 1.0)  # the first draft of a process is not timed
    assert cost.seconds == 0 and cost.levels(5, 0.03, 0.0) == 5
    cost.learn([0.5, 0.25], 0.003)
    assert cost.seconds == pytest.approx(0.003)
    assert cost.levels(5, 0.03, 0.0) == 3  # a third level gives 0.125 tokens, 3.75 ms; a fourth one half of that
    assert cost.levels(5, 0.03, 0.002) == 2  # a large batch: the pass takes 2 ms longer
    for _ in range(20):
        cost.learn([0.1], 0.0)  # a difficult text; without a second level the measurements expire
    assert cost.seconds == 0
    cost.learn([0.1, 0.05], 0.003)
    assert cost.levels(5, 0.03, 0.0) == 1
    cost.begin()  # another request
    assert cost.levels(5, 0.03, 0.0) == 5


def test_shipped_folders_are_methods_for_the_reference_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("msd", "msd-ar"):
        checkpoint.save(network(), tmp_path / name, {"thresholds": {"0.01": {"vision": 0.9}}})
    monkeypatch.setattr(registry, "ROOTS", (tmp_path,))
    found = {"msd", "msd:sampled", "msd:ar"}
    assert found <= set(registry.methods()) and not found & set(registry.methods("other/target"))
    one, other = registry.create("msd"), registry.create("msd:sampled")
    assert isinstance(one, MSD) and isinstance(other, MSD) and one.network is other.network
    assert other.sampled and not one.sampled and one.thresholds(0.01) == {"vision": 0.9}
    registry.register_folder(tmp_path / "msd")  # a registered folder replaces the shipped one, for any target
    assert {"msd", "msd:sampled"} <= set(registry.methods("other/target"))


def test_a_model_gets_the_drafter_trained_for_it(reference_model: tuple[Any, Any]) -> None:
    from msd.targets.registry import fingerprint

    model, processor = reference_model
    assert registry.default(fingerprint(model)) == "msd+prompt-lookup"
    assert SpeculativeVLM(model, processor).drafter.name == "msd+prompt-lookup"
    assert registry.default("llava-another") == "prompt-lookup"
    assert SpeculativeVLM(MODEL, None).drafter.name == "prompt-lookup"
    assert SpeculativeVLM(model, processor, drafter="ar").drafter.name == "ar"
