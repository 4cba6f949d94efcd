"""MSD's router and subtrees over another method's trunk: the output is the target's, the tree the router's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rivals
import tiny
import tiny_checkpoint
from msd.bench.data import Sample
from msd.certify import certificate
from msd.config import SpeculativeConfig
from msd.core import modality
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.algorithms.combined import TRUNKS, Combined
from msd.drafters.algorithms.msd import MSDConfig, MSDNetwork, Shape
from msd.errors import UserError
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.planning.plan import Budget
from msd.targets.state import State

MODEL = tiny.llava()


def router(model: object, **changes: object) -> MSDNetwork:
    """A network with random parameters that never predicts the end of an answer."""
    torch.manual_seed(3)
    made = MSDNetwork(MSDConfig.for_target(model.config.text_config, 60, rank=4, parent_rank=8, **changes))  # type: ignore[attr-defined]
    made.ending.requires_grad_(False)
    for p in made.ending.parameters():
        p.zero_()
    return made.attach(model).eval()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_output_is_the_targets(method: str) -> None:
    made = Combined(rivals.network(MODEL, method), router(MODEL))
    assert made.name == f"msd+{method}"
    for backend, settings in (("plain", {}), ("fused", {"verifier": "threshold"})):
        engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=5, backend=backend, **settings), made)
        inputs = rivals.prompts(3)
        L = inputs["input_ids"].shape[1]
        plain = MODEL.generate(**inputs, max_new_tokens=16, do_sample=False)[:, L:].tolist()
        for row, result in enumerate(engine.generate(**inputs, max_new_tokens=16, do_sample=False)):
            assert result.tokens == plain[row][: len(result.tokens)]
            assert result.finish == "length" or result.tokens[-1] == tiny.EOS
            assert result.statistics.num_draft_tokens > 0


def test_it_passes_verify(tmp_path: Path) -> None:
    model, processor = load_target(tiny_checkpoint.write(tmp_path / "target"))
    names = [f"msd+{method}" for method in TRUNKS]
    for method, name in zip(TRUNKS, names, strict=True):
        made = Combined(rivals.network(model, method), router(model))
        registry.register(name, lambda made=made: made)  # type: ignore[misc]
    photo = tmp_path / tiny_checkpoint.photos(tmp_path, 1)[0]
    samples = [Sample((photo,), "What is it?", None, "see"), Sample((), "Say.", None, "say")]
    rows = certificate.certify(model, processor, samples, names, 10, 1000, lambda _: None, "plain")
    assert [(row.method, row.passed) for row in rows] == [(name, True) for name in names]


@pytest.mark.parametrize("method", ["eagle3", "dspark"])
def test_the_router_shapes_the_tree(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one class has probability one, the tree has the shape of that class and its nodes its modality."""
    shapes = {"language": Shape(1, 4), "vision": Shape(3, 1), "fusion": Shape(2, 2)}
    made = Combined(rivals.network(MODEL, method), router(MODEL, shapes=shapes, active_from=0.5))
    trees: list[DraftTree] = []
    propose = Combined.propose

    def noting(self: Combined, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        trees.append(propose(self, state, replace(budget, seconds=None, passes=None), sampler))
        return trees[-1]

    monkeypatch.setattr(Combined, "propose", noting)
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=12, depth=6, adaptive=False), made)
    for kind, name in enumerate(made.msd.network.config.modalities):
        surely = torch.full((3,), -1e4)
        surely[kind] = 0.0
        monkeypatch.setattr(made.msd.network, "route", lambda f, e, s=surely: s.expand(*f.shape[:-1], 3))
        trees.clear()
        engine.generate(**tiny.llava_inputs(1, images=1), max_new_tokens=8, do_sample=False)
        drawn = [tree for tree in trees if tree.tokens.shape[1] > 1]
        assert drawn
        for tree in drawn:
            assert int(tree.depths.max()) <= shapes[name].depth
            widest = max(int((tree.depths[0] == d).sum()) for d in range(1, 7))
            assert widest <= shapes[name].width ** 2
            assert (tree.modality[:, 1:] == modality.get(name).id).all()


def test_a_router_is_needed() -> None:
    with pytest.raises(UserError, match="router"):
        Combined(rivals.network(MODEL, "eagle2"), router(MODEL, router=False))
