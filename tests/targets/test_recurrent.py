"""Hybrid targets: the states of recurrent layers after trees, ends of rows, turns, and within a budget of bytes.

`tests/targets/test_family_*` and `test_turns` ask of them what they ask of every family.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from families import BY_NAME
from family_layouts import VOCABULARY, WORDS
from msd.backends import choose
from msd.config import SpeculativeConfig
from msd.core.tree import Accepted, DraftTree, Step
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.planning.costs import Costs, measure
from msd.planning.plan import Plan
from msd.result import Result
from msd.targets import Past, adapt
from msd.targets.recurrent import RecurrentCache
from random_drafter import RandomDrafter
from recurrent_models import RECURRENT

ALL = [r.name for r in RECURRENT]
TWO = ["qwen3_5", "lfm2_vl"]  # a delta net, a short convolution
NAMES = [pytest.param(name, marks=[] if name in TWO else pytest.mark.full) for name in ALL]
NEW = 16
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


@cache
def model(name: str) -> Any:
    return BY_NAME[name].make()


def engine(name: str, answers: list[list[int]], seed: int = 1) -> SpeculativeVLM:
    config = SpeculativeConfig(backend="plain", adaptive=False)
    return SpeculativeVLM(model(name), None, config, RandomDrafter(seed, VOCABULARY, answers))


def generate(name: str, row: dict[str, Any], **settings: Any) -> list[int]:
    """The answer of `transformers`."""
    out = model(name).generate(**row, **(GREEDY | {"eos_token_id": None} | settings))
    return out[0, row["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def step_by_step(name: str, row: dict[str, Any], tokens: list[int]) -> list[Tensor]:
    """The logits after a prompt and after each of `tokens`: one token at a time, with the library's own cache."""
    target, past, ids = model(name), DynamicCache(config=model(name).config), row["input_ids"]
    positions = target._prepare_position_ids_for_generation(ids, dict(row))
    kwargs = {k: v for k, v in row.items() if k != "input_ids"}
    inputs = target.prepare_inputs_for_generation(
        ids, past_key_values=past, is_first_iteration=True, use_cache=True, position_ids=positions, **kwargs
    )
    found = [target(**inputs).logits[0, -1]]
    newest = positions[-3:, :, -1:] if positions.dim() == 3 else positions[:, -1:]
    for i, token in enumerate(tokens):
        out = target(
            input_ids=torch.tensor([[token]]), position_ids=newest + i + 1, past_key_values=past, use_cache=True
        )
        found.append(out.logits[0, -1])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_tree_are_those_of_single_token_decoding(name: str) -> None:
    """Before and after a commit. Within 2e-5 of the largest logit."""
    family, rng = BY_NAME[name], random.Random(2)
    row = family.row(family.parts(1, ["image"]))
    target = adapt(model(name), backend="plain")
    inputs = target.encode_images(dict(row))
    with torch.no_grad():
        state, _ = target.prefill(inputs.pop("input_ids"), inputs, 64)
    state.layout.append(0, [WORDS])
    emitted = [WORDS]
    for _ in range(3):
        tokens = [rng.randrange(WORDS, VOCABULARY) for _ in range(7)]
        parents = [0, 0, 1, 1, 2, 3, 3]
        with torch.no_grad():
            scores = target.score(state, DraftTree.from_lists(state.layout.newest(), [tokens], [parents]))
        for path in ([], [1], [2], [1, 3], [1, 4], [2, 5], [1, 3, 6], [1, 3, 7]):
            wanted = step_by_step(name, row, emitted + [tokens[n - 1] for n in path])[-1]
            difference = (scores.logits[0, path[-1] if path else 0] - wanted).abs().max()
            assert difference <= 2e-5 * wanted.abs().max(), path
        kept = rng.choice([[], [2], [1, 4], [1, 3, 7]])
        more = [*(tokens[n - 1] for n in kept), rng.randrange(WORDS, VOCABULARY)]
        state.layout.append(0, more)
        target.commit(state, Accepted([kept], [more]))
        emitted += more


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_end_apart(name: str) -> None:
    """Finished rows leave the batch, and the states of the others move to their places."""
    family = BY_NAME[name]
    rows = [family.parts(seed, kinds, words) for seed, kinds, words in ((3, ["image"], 12), (4, [], 8), (5, [], 10))]
    free = [generate(name, family.row(parts)) for parts in rows]
    stop = free[0][3]
    wanted = [generate(name, family.row(parts), eos_token_id=stop) for parts in rows]
    assert len({len(answer) for answer in wanted}) > 1, "the rows should differ in length"
    results = engine(name, wanted).generate(**family.batch(rows), **GREEDY, eos_token_id=stop)
    assert isinstance(results, list)
    assert [r.tokens for r in results] == wanted


@pytest.mark.parametrize("name", TWO)
def test_a_state_kept_at_a_wrong_node_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the parent of the last accepted node: the keys are right, the tokens are not."""
    family = BY_NAME[name]
    row = family.row(family.parts(3, ["image"]))
    wanted = generate(name, row)
    own = RecurrentCache.commit

    def answer() -> list[int]:
        result = engine(name, [wanted]).generate(**row, **GREEDY, eos_token_id=None)
        assert isinstance(result, Result) and result.statistics.num_accepted_draft_tokens > 0
        return result.tokens

    def wrong(self: RecurrentCache, paths: list[list[int]]) -> None:
        for states in self.states.values():
            states.commit([paths[row][-2:][0] for row in self.rows])
            states.nodes = [state[:, None].expand(-1, 64, *state.shape[1:]) for state in states.committed]
        own(self, paths)

    assert answer() == wanted
    monkeypatch.setattr(RecurrentCache, "commit", wrong)
    assert answer() != wanted


def test_a_pass_that_is_not_committed_changes_nothing() -> None:
    """Also one that fails: the committed states are those before it."""
    name = "qwen3_5"
    family, target = BY_NAME[name], adapt(model("qwen3_5"), backend="plain")
    inputs = family.row(family.parts(1, []))
    with torch.no_grad():
        state, _ = target.prefill(inputs.pop("input_ids"), inputs, 64)
        state.layout.append(0, [WORDS])
        tree = DraftTree.from_lists(state.layout.newest(), [[20, 21, 22]], [[0, 1, 0]])
        first, again = target.score(state, tree).logits, target.score(state, tree).logits
        assert torch.equal(first, again)
        mixer = model(name).get_decoder().layers[2].linear_attn
        handle = mixer.out_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.score(state, tree)
        handle.remove()
        assert torch.equal(first, target.score(state, tree).logits)
        assert "forward" not in vars(mixer)


def test_a_forward_that_other_code_replaced_runs_and_stays() -> None:
    """As accelerate replaces it on models that are spread over devices."""
    name = "lfm2_vl"
    family, changed = BY_NAME[name], copy.deepcopy(model(name))
    mixer, calls = changed.get_decoder().layers[0].conv, []
    own = mixer.forward

    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        out: Tensor = own(*args, **kwargs)
        return out

    mixer.forward = replaced
    row = family.row(family.parts(3, ["image"]))
    drafter = RandomDrafter(1, VOCABULARY, [generate(name, row)])
    vlm = SpeculativeVLM(changed, None, SpeculativeConfig(backend="plain", adaptive=False), drafter)
    result = vlm.generate(**row, **GREEDY, eos_token_id=None)
    assert isinstance(result, Result)
    assert result.tokens == generate(name, row)
    assert mixer.forward is replaced and len(calls) > len(result.statistics.steps)


@pytest.mark.parametrize("name", TWO)
def test_a_turn_reuses_a_state_only_where_it_is(name: str) -> None:
    """A conversation that goes on after the answer reuses all of it, one whose answer was edited nothing."""
    family, vlm = BY_NAME[name], engine(name, [])
    words = GREEDY | {"eos_token_id": None, "suppress_tokens": list(range(WORDS))}
    parts = family.parts(1, ["image"])
    for reuses in (True, False):
        past = Past()
        first = vlm.generate(**family.row(parts), **words, past=past)
        assert isinstance(first, Result)
        row = family.row([*parts, *(first.tokens if reuses else [*first.tokens[:-3], 20, 21, 22]), 30, 31, 32])
        later = vlm.generate(**row, **words, past=past)
        assert isinstance(later, Result)
        assert later.tokens == generate(name, row, **words)
        assert later.statistics.num_prefill_rows == (4 if reuses else row["input_ids"].shape[1])


def test_bytes_cap_the_nodes_of_all_rows() -> None:
    name = "qwen3_5"
    family = BY_NAME[name]
    rows = [family.parts(seed, [], 10) for seed in (3, 4)]
    wanted = [generate(name, family.row(parts)) for parts in rows]
    cache = adapt(model(name), backend="plain").prefill(family.row(rows[0])["input_ids"], {}, 64)[0].cache
    text = model(name).config.get_text_config()
    per_layer = 4 * (4 * 8 * 8 + (2 * 2 * 8 + 4 * 8) * text.linear_conv_kernel_dim)
    assert cache.node_bytes == per_layer * text.layer_types.count("linear_attention")
    for fitting, most in ((2 * 100, 8), (2 * 7, 6), (2 * 3 + 1, 2), (2, 0), (0, 0)):
        vlm, sizes = engine(name, wanted), []
        vlm.plan = Plan(8, 6, state_bytes=fitting * cache.node_bytes)

        def record(step: Step, sizes: list[int] = sizes) -> None:
            sizes.append(step.tree.size - 1)

        results = vlm.generate(**family.batch(rows), **GREEDY, eos_token_id=None, on_step=record)
        assert isinstance(results, list)
        assert [r.tokens for r in results] == wanted
        assert max(sizes) <= most and (most == 0) == (max(sizes) == 0)


def fake(rows: int = 1) -> Any:
    """As much of a sampler as a plan reads."""
    layout = SimpleNamespace(batch=rows, end=[100] * rows)
    return SimpleNamespace(layout=layout, alive=list(range(rows)), tokens_left=lambda row: 50, may_draft=lambda _: True)


def test_the_plan_chooses_a_chain_or_a_tree() -> None:
    cheap = Costs((1, 9, 33), (64, 512), ((1.0, 1.8, 4.2), (1.0, 1.8, 4.2)), level=0.2)
    dear = Costs((1, 9, 33), (64, 512), ((1.0, 5.4, 18.6), (1.0, 5.4, 18.6)), level=0.2)
    plan = Plan(8, 4, costs=cheap, state_bytes=1000)
    free = plan.budget(fake(), 10)
    assert (free.nodes, free.width) == (8, None)
    assert free.passes == pytest.approx([1.0, 1.1, 1.4, 1.7, 2.0, 2.1, 2.2, 2.3, 2.4])  # levels cost 0.2 up to depth 4
    assert plan.budget(fake(4), 10).nodes == 8
    capped = plan.budget(fake(20), 10)
    assert (capped.nodes, capped.width) == (4, 1)  # no more nodes than levels
    assert plan.budget(fake(), 600).nodes == 0 and plan.budget(fake(), 600).depth == [0]
    assert Plan(8, 4, costs=dear).budget(fake(), 10).width == 1  # a sibling costs half a plain pass
    assert Plan(8, 4, costs=dear).budget(fake()).width is None
    assert Plan(4, 4).budget(fake(), 10).width is None  # nobody took nodes away


def test_a_level_is_measured() -> None:
    """A chain runs the mixers once per node, a flat tree twice in all."""
    target = adapt(model("qwen3_5"), backend="plain")
    found = measure(target, (1, 2, 3, 9), (16, 32))
    assert found.nodes == (1, 2, 3, 9) and found.level > 0
    assert measure(adapt(BY_NAME["llava"].make(), backend="plain"), (1, 2), (8, 16)).level == 0


def test_what_hybrids_refuse() -> None:
    with pytest.raises(UserError, match="decoders of class Qwen3_5TextModel have no fused pass; use backend 'plain'"):
        choose(model("qwen3_5"), "fused")
    cache = RecurrentCache(model("qwen3_5").config.get_text_config(), 1, 8)
    with pytest.raises(UserError, match="cannot be cropped"):
        cache.crop(-1)
    other = copy.deepcopy(model("qwen3_5"))
    other.config.get_text_config().layer_types = ["hybrid"] * 3
    with pytest.raises(UserError, match="layers of kind 'hybrid', whose state no adapter keeps yet"):
        adapt(other)
