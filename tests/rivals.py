"""Rival drafters with random weights on tiny targets, and teacher batches for them."""

from __future__ import annotations

from typing import Any

import torch

import tiny
from msd.drafters import registry
from msd.drafters.toolkit.network import DraftNetwork
from msd.targets import adapt
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train.teacher_batches import TeacherCache

LENGTH = 16
RIVALS = {m.name: m.network for m in registry.catalogue() if m.network is not None and m.name != registry.DEFAULT}


def network(model: Any, method: str, seed: int = 0, **changes: Any) -> DraftNetwork:
    """Creates a random network of a method for a tiny target."""
    torch.manual_seed(seed)
    if RIVALS[method].reduced:
        changes = {"draft_vocabulary": 60} | changes
    net = RIVALS[method].for_target(model.config.text_config, **changes)
    if RIVALS[method].reduced:
        net.choose_draft_vocabulary(torch.arange(4, 64))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net.attach(model).eval()


def prompts(rows: int = 4, first: int = 0) -> dict[str, torch.Tensor]:
    """Returns prompts of unequal lengths, from number `first`; number s has s modulo 3 images."""
    return tiny.batch(*(tiny.llava_inputs(s, images=s % 3, words=6 + s) for s in range(first, first + rows)))


def teacher_batch(model: Any, net: DraftNetwork, rows: int = 4, first: int = 0) -> TeacherBatch:
    """Returns greedy answers of `LENGTH` tokens with the target's log p over the network's vocabulary."""
    inputs = prompts(rows, first)
    out = model.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, suppress_tokens=[tiny.IMAGE]
    )
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    cache = TeacherCache(model.get_output_embeddings(), net.ids, net.config.taps, 1.0, torch.float32)
    target = adapt(model, net.config.taps)
    return cache.get(0, lambda: (run_teacher(target, inputs, answers), torch.zeros(rows, LENGTH)))[0]
