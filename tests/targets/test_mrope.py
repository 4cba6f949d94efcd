"""M-RoPE: cache slots, three rotary axes and the rope delta in prefill, trees and drafts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from families import BY_NAME
from family_layouts import IMAGE, VIDEO, WORDS
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.tree import DraftTree, Scores
from msd.drafters.algorithms.msd import MSDConfig, MSDNetwork
from msd.model import SpeculativeVLM
from msd.result import Result
from msd.targets import State, Target, adapt

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SHOWN = [["image"], ["image", "image"], ["video"], []]


@cache
def model(name: str) -> Any:
    return BY_NAME[name].make()


@torch.no_grad()
def prefilled(name: str) -> tuple[Target, State, Scores]:
    """A padded batch with an image, two images, a video and text only; its newest tokens are not in the cache yet."""
    family, target = BY_NAME[name], adapt(model(name), (1, 3), backend="plain")
    inputs = target.encode_images(family.batch([family.parts(i, kinds) for i, kinds in enumerate(SHOWN)]))
    state, scores = target.prefill(inputs.pop("input_ids"), inputs, 96)
    for row in range(len(SHOWN)):
        state.layout.append(row, [WORDS + row])
    return target, state, scores


@pytest.mark.parametrize("name", NAMES)
def test_prompt_positions_are_those_of_the_model(name: str) -> None:
    _, state, _ = prefilled(name)
    layout = state.layout
    for row, kinds in enumerate(SHOWN):
        family = BY_NAME[name]
        alone = family.row(family.parts(row, kinds))
        ids = alone.pop("input_ids")
        start, end = layout.start[row], layout.end[row] - 1
        assert end - start == ids.shape[1]
        ours = layout.positions[:, row, start:end]
        if not kinds:
            assert torch.equal(ours, torch.arange(end - start).expand(3, -1))
            continue
        positions, delta = model(name).model.get_rope_index(ids, **alone)
        assert torch.equal(ours, positions[:, 0])
        assert int(delta[0, 0]) < 0 or name == "qwen3_vl", "images occupy fewer positions than columns"
        text = (ids[0] != IMAGE) & (ids[0] != VIDEO)
        assert bool((ours[:, text] == ours[0, text]).all()), "text has one position on all axes"
        assert not bool((ours[:, ~text] == ours[0, ~text]).all()), "images do not"
        assert not torch.equal(ours[0], torch.arange(end - start)), "positions differ from columns"


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_continues_every_axis_for_any_stored_rope_delta(name: str) -> None:
    """The model stores the delta of its last prompt, perhaps of another request; scoring must not read it."""
    target, state, _ = prefilled(name)
    nodes = len(SHOWN)
    tree = DraftTree.from_lists(state.layout.newest(), [[20, 21, 22]] * nodes, [[0, 1, 0]] * nodes)
    expected = state.layout.next_positions(tree.depths)
    newest = torch.stack([state.layout.positions[:, r, e - 1] for r, e in enumerate(state.layout.end)], 1)
    assert expected.shape == (3, nodes, 4)
    assert torch.equal(expected, newest[:, :, None] + torch.tensor([0, 1, 2, 1]))
    seen: list[torch.Tensor] = []
    hook = model(name).model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits = []
    with torch.no_grad():
        for stale in (None, torch.full((nodes, 1), 999), torch.zeros(1, 1, dtype=torch.long)):
            model(name).model.rope_deltas = stale
            logits.append(target.score(state, tree).logits)
    hook.remove()
    assert all(torch.equal(positions, expected) for positions in seen)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", NAMES)
def test_each_axis_has_an_effect(name: str) -> None:
    """Otherwise these tests would pass with any positions."""
    target, state, _ = prefilled(name)
    tree = DraftTree.from_lists(state.layout.newest(), [[20, 21, 22]] * len(SHOWN), [[0, 1, 0]] * len(SHOWN))
    with torch.no_grad():
        right = target.score(state, tree).logits
        for axis in range(3):
            was = state.layout.positions.clone()
            state.layout.positions[axis] += 3
            assert (target.score(state, tree).logits - right).abs().max() > 1e-3, f"axis {axis}"
            state.layout.positions = was


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_text_after_a_video_continues_from_the_newest_token_as_in_generate(name: str) -> None:
    """This video's time axis ends after the position that the rope delta gives the next column.

    `generate()` adds one to each axis instead, and so do trees.
    """
    family = BY_NAME[name]
    row = family.row([20, family.picture(1, "video")])
    ids, arguments = row["input_ids"], {k: v for k, v in row.items() if k != "input_ids"}
    positions, delta = model(name).model.get_rope_index(ids, **arguments)
    newest = int(positions[0, 0, -1])
    assert int(positions.max()) > newest
    assert ids.shape[1] + int(delta[0, 0]) > newest + 1, "the position of the next column by the delta"
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "eos_token_id": None}
    torch.manual_seed(2)
    wanted = model(name).generate(**row, **settings)[0, ids.shape[1] :].tolist()
    result = SpeculativeVLM(model(name), None, drafter="prompt-lookup").generate(**row, **settings, seed=2)
    assert isinstance(result, Result)
    assert result.tokens == wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_drafter_uses_the_positions_of_text(name: str, compressed: bool) -> None:
    """The drafter has one axis, equal to all three for text; images end directly before the text after them.

    A compressed image has its last positions. The image's own tokens have the larger one of row and column.
    """
    _, state, scores = prefilled(name)
    layout: Layout = state.layout
    line, text = layout.positions_1d(), layout.modality == LANGUAGE.id
    for axis in range(3):
        assert torch.equal(line[text], layout.positions[axis][text])
    config = MSDConfig.for_target(
        model(name).config.text_config, 48, taps=(1, 3), image_tokens=2, rank=4, vision=compressed
    )
    network = MSDNetwork(config).attach(model(name))
    assert scores.taps is not None
    with torch.no_grad():
        found = network.read(layout, scores.taps)
    for row, shown in enumerate(SHOWN):
        assert (
            found.anchors(torch.tensor([[layout.end[row] - 2]] * len(SHOWN)), []).positions[row, 0]
            == (layout.positions[0, row, layout.end[row] - 2])
        )
        positions = found.selection.positions[row][found.selection.present[row]]
        if shown != ["video"] and compressed:
            assert bool((positions[1:] >= positions[:-1]).all()), "in reading order"
        assert int(positions.max()) < layout.end[row] - layout.start[row] - 1 or not shown


@pytest.mark.full
def test_images_are_numbered_by_row_unless_positions_are_given() -> None:
    """HunYuan-VL: the library counts on from row to row, so that a row depends on those above it."""
    family, target = BY_NAME["hunyuan_vl"], adapt(model("hunyuan_vl"), backend="plain")
    prompts = [family.parts(3, ["image"]), family.parts(4, ["image", "image"], 9), family.parts(5, [])]
    inputs = family.batch(prompts)
    ids = inputs.pop("input_ids")
    library = target.model._prepare_position_ids_for_generation(ids, {**inputs, "input_ids": ids})
    layout, _ = target.lay_out(ids, inputs, 96)
    for row, parts in enumerate(prompts):
        alone = family.row(parts)
        own, _ = target.lay_out(alone.pop("input_ids"), alone, 96)
        start, end = layout.start[row], layout.end[row]
        assert torch.equal(layout.positions[:, row, start:end], own.positions[:, 0, : end - start])
    ours = layout.positions[:, :, : ids.shape[1]]
    assert not torch.equal(ours[-1, 1], library[-1, 1]) and torch.equal(ours[:, [0, 2]], library[:, [0, 2]])
    given, _ = target.lay_out(ids, {**inputs, "position_ids": library}, 96)
    assert torch.equal(given.positions[:, :, : ids.shape[1]], library)


def test_families_with_1_d_positions_have_one_axis() -> None:
    family = BY_NAME["llava"]
    target = adapt(family.make(), backend="plain")
    row = family.row(family.parts(1, ["image"]))
    layout, _ = target.lay_out(row["input_ids"], row, 64)
    assert layout.positions.shape[0] == 1
    assert layout.positions_1d().data_ptr() == layout.positions.data_ptr()
