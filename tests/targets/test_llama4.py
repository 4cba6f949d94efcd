"""Llama 4 scales queries by column; a tree node's column is not its cache slot."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from families import BY_NAME
from msd.core.tree import DraftTree
from msd.targets import adapt
from msd.targets.llama4 import Llama4


def test_scores_of_a_tree_over_several_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama4"].make()
    for layer in model.get_decoder().model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = 3, 2.0
    model.config.text_config.floor_scale, model.config.text_config.attn_scale = 3, 2.0
    target, prompt = adapt(model, backend="plain"), torch.arange(20, 30)[None]
    tokens, parents = [31, 32, 33, 34, 35, 36], [0, 0, 1, 2, 3, 4]  # two chains, interleaved
    paths = [[], [31], [32], [31, 33], [32, 34], [31, 33, 35], [32, 34, 36]]

    def largest_difference() -> float:
        with torch.no_grad():
            state, _ = target.prefill(prompt, {}, 32)
            state.layout.append(0, [30])
            scores = target.score(state, DraftTree.from_lists(state.layout.newest(), [tokens], [parents]))
            alone = [model(torch.cat([prompt, torch.tensor([[30, *p]])], 1)).logits[0, -1] for p in paths]
        return float((scores.logits[0] - torch.stack(alone)).abs().max())

    assert largest_difference() <= 1e-4
    monkeypatch.setattr(Llama4, "scoring", lambda *_: nullcontext())
    assert largest_difference() > 1e-3, "the correction has an effect"
