"""Every rival drafts the same in training and decoding, and the output is always the target's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

import rivals
import tiny
import tiny_checkpoint
from msd.bench.data import Sample
from msd.certify import certificate
from msd.config import SpeculativeConfig
from msd.core.layout import Layout
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSDConfig
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import Memory, TrainedDrafter
from msd.errors import UserError
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget
from msd.targets.teacher import TeacherBatch

METHODS = list(rivals.RIVALS)
MODEL = tiny.llava()
GREEDY: Any = SimpleNamespace(do_sample=False, outlook=lambda rows, levels: None)  # a sampler


@pytest.mark.parametrize("method", METHODS)
def test_output_is_the_targets(method: str) -> None:
    net = rivals.network(MODEL, method)
    for backend in ("plain", "fused"):
        config = SpeculativeConfig(nodes=9, depth=5, backend=backend)
        engine = SpeculativeVLM(MODEL, None, config, TrainedDrafter(net))
        inputs = rivals.prompts(2)
        L = inputs["input_ids"].shape[1]
        plain = MODEL.generate(**inputs, max_new_tokens=20, do_sample=False)[:, L:].tolist()
        for row, result in enumerate(engine.generate(**inputs, max_new_tokens=20, do_sample=False)):
            assert result.tokens == plain[row][: len(result.tokens)]
            assert result.finish == "length" or result.tokens[-1] == tiny.EOS
            assert result.statistics.num_draft_tokens > 0
        for images in (0, 1):
            one = tiny.llava_inputs(1, images=images)
            length = one["input_ids"].shape[1]
            torch.manual_seed(5)
            drawn = MODEL.generate(**one, max_new_tokens=20, do_sample=True, temperature=0.8)[0, length:]
            seeded = engine.generate(**one, max_new_tokens=20, do_sample=True, temperature=0.8, seed=5)
            assert seeded.tokens == drawn.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_tiles_of_another_family(method: str) -> None:
    """LLaVA-NeXT: an image of several tiles, and a twin for a target of another size."""
    model = tiny.llava_next()
    one = tiny.llava_next_inputs(1)
    plain = model.generate(**one, max_new_tokens=12, do_sample=False)[0, one["input_ids"].shape[1] :].tolist()
    drafter = TrainedDrafter(rivals.network(MODEL, method)).twin(tiny.llava(vocab=90))
    assert drafter.name == method and drafter.network.config.vocabulary == 90
    for candidate in (TrainedDrafter(rivals.network(model, method)), drafter.twin(model)):
        engine = SpeculativeVLM(model, None, SpeculativeConfig(nodes=9, depth=5, adaptive=False), candidate)
        result = engine.generate(**one, max_new_tokens=12, do_sample=False)
        assert result.tokens == plain and result.statistics.num_draft_tokens > 0


def test_every_rival_passes_verify(tmp_path: Path) -> None:
    """The certificate of `msd verify`: greedy, sampled, warped and penalised, with a photo and without."""
    model, processor = load_target(tiny_checkpoint.write(tmp_path / "target"))
    for method in METHODS:
        net = rivals.network(model, method)
        registry.register(method, lambda net=net: TrainedDrafter(net))  # type: ignore[misc]
    photo = tmp_path / tiny_checkpoint.photos(tmp_path, 1)[0]
    samples = [Sample((photo,), "What is it?", None, "see"), Sample((), "Say.", None, "say")]
    rows = certificate.certify(model, processor, samples, METHODS, 10, 1000, lambda _: None, "plain")
    assert [row.method for row in rows] == METHODS
    for row in rows:
        assert row.passed and row.compared == 12, (row.method, row.differences)


def decoded(net: Any, batch: TeacherBatch, steps: list[list[int]]) -> tuple[Memory, list[int]]:
    """Returns (the memory after decoding `steps`, the end of each row); a step lists the emitted tokens per row."""
    whole, L = batch.layout, batch.prompt
    at = lambda end: Layout(whole.tokens, whole.modality, whole.positions, whole.start, end)  # noqa: E731
    end = [L + 1] * whole.batch
    memory = Memory.begin(net, at(end), batch.taps[:, :L])
    for added in steps:
        first, end = end, [e + n for e, n in zip(end, added, strict=True)]
        column = (torch.tensor(first)[:, None] - 1 + torch.arange(max(added))).clamp_max(whole.tokens.shape[1] - 2)
        rows = torch.arange(whole.batch)[:, None]
        memory.append(net, batch.taps[rows, column], whole.tokens[rows, column + 1], added)
    return memory, end


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [[], [[3, 1, 2, 3], [0, 2, 1, 4]]])
def test_training_and_decoding_distributions_agree(method: str, steps: list[list[int]]) -> None:
    """Compares the distributions below a root: from a whole text in training, and from a text read step by step."""
    net = rivals.network(MODEL, method)
    batch = rivals.teacher_batch(MODEL, net)
    memory, end = decoded(net, batch, steps)
    roots = torch.tensor([[e - 1 - batch.prompt] for e in end])
    index = roots[..., None] + torch.arange(1, 4)
    answers = batch.answers
    states = net.states(batch, roots, 3)
    logits = net.logits(states, answers[torch.arange(4)[:, None, None], index - 1])
    anchors = memory.anchors()
    newest = answers.gather(1, roots)[:, 0]
    levels = net.levels(anchors, newest)
    found = [levels.root(torch.ones(4, 1, 1))]
    for d in range(1, 3):
        found.append(levels.below(answers.gather(1, roots + d), torch.zeros(4, 1, dtype=torch.long)))
    for d, distribution in enumerate(found):
        assert torch.allclose(distribution.logits[:, 0], logits[:, 0, d], atol=1e-4), d
        assert distribution.logits.std() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_draft_as_if_alone(method: str) -> None:
    net = rivals.network(MODEL, method)
    batch = rivals.teacher_batch(MODEL, net)
    memory, _ = decoded(net, batch, [])
    anchors = memory.anchors()
    levels = net.levels(anchors, batch.answers[:, 0])
    together = levels.root(torch.ones(4, 1, 1)).logits
    for row in range(4):
        start = batch.layout.start[row]
        cut = lambda x: x[row : row + 1, start:]  # noqa: B023, E731
        layout = Layout(
            cut(batch.layout.tokens), cut(batch.layout.modality),
            batch.layout.positions[:, row : row + 1, start:], [0], [batch.prompt + 1 - start],
        )  # fmt: skip
        alone = Memory.begin(net, layout, batch.taps[row : row + 1, start : batch.prompt])
        own = alone.anchors()
        distribution = net.levels(own, batch.answers[row : row + 1, 0])
        assert torch.allclose(distribution.root(torch.ones(1, 1, 1)).logits[0], together[row], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_learnt(method: str) -> None:
    """Every parameter gets a gradient, and the loss falls on a repeated batch."""
    net = rivals.network(MODEL, method).train()
    batch = rivals.teacher_batch(MODEL, net)
    text = replace(batch, layout=replace(batch.layout, modality=torch.zeros_like(batch.layout.modality)))
    roots = torch.arange(rivals.LENGTH - 1).expand(4, -1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses, still = [], {n for n, p in net.named_parameters()}
    for step in range(30):
        torch.manual_seed(step)
        loss, parts = net.loss(batch, roots)
        assert set(parts) and all(torch.isfinite(p) for p in parts.values())
        loss.backward()
        still -= {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert still == set()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(net.loss(text, roots)[0])


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_strictly(method: str, tmp_path: Path) -> None:
    net = rivals.network(MODEL, method)
    checkpoint.save(net, tmp_path, {"answers": 3})
    again = registry.load(tmp_path)
    assert type(again) is type(net) and again.config == net.config and checkpoint.method(tmp_path) == method
    for name, value in net.state_dict().items():
        assert torch.allclose(again.state_dict()[name].float(), value.float(), atol=1e-2), name
    assert not any("embed" in name or name == "head" for name in net.state_dict())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    name = sorted(tensors)[0]
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"'{name}' is missing"),
        (tensors | {"more": torch.zeros(1)}, "'more' is unknown"),
    ):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            registry.load(tmp_path)


def test_eight_bits_are_nearly_the_same(tmp_path: Path) -> None:
    """The file is half as large, each weight within half a quantisation step, and the output is the target's."""
    net = rivals.network(MODEL, "dspark")
    checkpoint.save(net, tmp_path / "whole")
    checkpoint.save(net, tmp_path / "small", eight_bit=True)
    size = {n: (tmp_path / n / "model.safetensors").stat().st_size for n in ("whole", "small")}
    assert size["small"] < 0.62 * size["whole"]
    again = registry.load(tmp_path / "small")
    for name, value in net.state_dict().items():
        step = value.abs().amax(-1, keepdim=True) / 127 if value.dim() > 1 else value.abs() * 1e-3 + 1e-6
        assert ((again.state_dict()[name] - value).abs() <= 0.55 * step + 1e-4).all(), name
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=5), TrainedDrafter(again))
    one = tiny.llava_inputs(1)
    plain = MODEL.generate(**one, max_new_tokens=12, do_sample=False)[0, one["input_ids"].shape[1] :].tolist()
    assert engine.generate(**one, max_new_tokens=12, do_sample=False).tokens == plain


def test_a_foreign_target_is_refused() -> None:
    with pytest.raises(UserError, match="was trained for a target with 64 tokens"):
        SpeculativeVLM(tiny.llava(vocab=70), None, None, TrainedDrafter(rivals.network(MODEL, "eagle2")))


def test_a_parent_wins_a_tie() -> None:
    """If a child is exactly as likely as its parent, the kept nodes still form a tree."""
    net = rivals.network(MODEL, "eagle2")
    logits = torch.full((64,), -1e4)
    logits[7] = 1e4  # q = 1: every node of this path has the same score
    net.logits = lambda states, parents: logits.expand(*states.shape[:-1], -1)  # type: ignore[method-assign]
    batch = rivals.teacher_batch(MODEL, net)
    whole = batch.layout
    layout = Layout(whole.tokens, whole.modality, whole.positions, whole.start, [batch.prompt + 1] * 4)
    state: Any = SimpleNamespace(layout=layout, memory=None, auxiliary=None)
    drafter = TrainedDrafter(net)
    drafter.begin(state, SimpleNamespace(taps=batch.taps[:, : batch.prompt]))  # type: ignore[arg-type]
    for nodes in (1, 2, 4):
        tree = drafter.propose(state, Budget(nodes, [5] * 4), GREEDY)
        assert tree.parents[0].tolist() == list(range(-1, nodes))
        assert tree.tokens[0, 1:].tolist() == [7] * nodes


def test_trees_grow_as_in_eagle_2() -> None:
    """Compares with brute force: k children of each of k frontier nodes, the k best expanded, the best of all kept."""
    net = rivals.network(MODEL, "eagle2", width=3, depth=3)
    batch = rivals.teacher_batch(MODEL, net)
    memory, _ = decoded(net, batch, [])
    anchors = memory.anchors()

    def distribution(row: int, path: tuple[int, ...]) -> torch.Tensor:
        levels = net.levels(anchors, batch.answers[:, 0])
        z = levels.root(torch.ones(4, 1, 1))
        for token in path:
            z = levels.below(torch.full((4, 1), token), torch.zeros(4, 1, dtype=torch.long))
        return z.logits[row, 0].detach().log_softmax(-1)

    whole, end = batch.layout, [batch.prompt + 1] * 4
    layout = Layout(whole.tokens, whole.modality, whole.positions, whole.start, end)
    state: Any = SimpleNamespace(layout=layout, memory=None, auxiliary=None)
    drafter = TrainedDrafter(net)
    drafter.begin(state, SimpleNamespace(taps=batch.taps[:, : batch.prompt]))  # type: ignore[arg-type]
    sampler = GREEDY
    tree = drafter.propose(state, Budget(7, [3] * 4), sampler)
    for row in range(4):
        frontier, every = [((), 0.0)], []
        for _ in range(3):
            children = []
            for path, score in frontier:
                top = distribution(row, path).topk(3)
                children += [((*path, int(t)), score + float(q)) for q, t in zip(*top, strict=True)]
            every += children
            frontier = sorted(children, key=lambda c: -c[1])[:3]
        best = {path for path, _ in sorted(every, key=lambda c: (-c[1], len(c[0])))[:7]}
        found = set()
        for n in range(1, tree.size):
            path, at = [], n
            while at > 0:
                path.append(int(tree.tokens[row, at]))
                at = int(tree.parents[row, at])
            found.add(tuple(path[::-1]))
        assert found == best


def test_rivals_and_msd_read_the_same_sizes() -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    assert theta != 10000.0, "its layers have two rotary bases"
    ours = MSDConfig.for_target(config, 64)
    assert rivals.RIVALS["eagle2"].for_target(config).config.rope_theta == ours.rope_theta == theta


def test_a_tree_is_no_wider_than_half_of_its_nodes() -> None:
    drafter = TrainedDrafter(rivals.network(MODEL, "eagle2"))
    state: Any = SimpleNamespace(layout=SimpleNamespace(newest=lambda: torch.tensor([5, 6])))
    for nodes, limit, width in ((8, None, 4), (60, None, 10), (60, 3, 3), (8, 6, 4), (1, None, 1)):
        (shape,) = drafter.subtrees(state, [0], Budget(nodes, [6, 6], limit)).shapes
        assert shape.width == width
