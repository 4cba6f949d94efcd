"""The arithmetic of docs/scale.md: its counts against networks and passes that exist, and its page against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes.scale import arithmetic
from recipes.scale.arithmetic import Run
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig

import rivals
import tiny
from msd.estimate.roofline import CARDS
from msd.estimate.sizes import of_config

CARD = CARDS["h100"]


def test_the_page_has_the_tables_of_the_script() -> None:
    text = arithmetic.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- hours -->") == text.count("<!-- bytes -->") == 1
    assert arithmetic.written(text, Run(), CARD) == text, "python -m recipes.scale.arithmetic --write"


def test_sizes_are_those_of_the_built_model() -> None:
    """Also 8.77 billion parameters in all, as published."""
    sizes = arithmetic.QWEN
    text = {
        "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
    }  # fmt: skip
    built = of_config("built", Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": sizes.hidden}))
    assert built.decoder == pytest.approx(sizes.decoder, rel=1e-3) and built.kv == sizes.kv
    assert sizes.model == pytest.approx(8.77e9, rel=0.03) and built.total == pytest.approx(8.77e9, rel=0.01)


@pytest.mark.parametrize(("method", "depth"), [("eagle3", 7), ("dflash", 7)])
def test_draft_flops_are_those_of_a_pass(method: str, depth: int) -> None:
    model = tiny.llava()
    net: Any = rivals.network(model, method)
    batch = rivals.teacher_batch(model, net, rows=1)
    roots = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        states = net.states(batch, roots, depth)
        net.logits(states, batch.answers[:, :8, None].expand(-1, -1, depth))
    context = batch.taps.shape[1] - 1
    assert arithmetic.forward_flops(net, context, 8, depth) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_ring_sends_what_is_reckoned() -> None:
    """Each of n GPUs passes on n - 1 chunks twice: to sum them, and to spread the sums."""
    for gpus, speed in ((1, arithmetic.INSIDE), (8, arithmetic.INSIDE), (64, arithmetic.BETWEEN)):
        sent = sum(4 * 1024 / gpus for _ in range(2) for _ in range(gpus - 1))
        assert arithmetic.exchange_seconds(1024, gpus) == pytest.approx(sent / speed)


def test_more_gpus_take_less_time_and_no_fewer_gpu_hours() -> None:
    run = Run(answers=10_000)
    for target in arithmetic.TARGETS:
        found = [arithmetic.hours(target, "eagle3", gpus, run, CARD) for gpus in arithmetic.GPUS]
        for gpus, more in zip(arithmetic.GPUS, found, strict=True):
            assert more["writing"] * gpus == pytest.approx(found[0]["writing"])
            assert more["training"] * gpus >= found[0]["training"] * (1 - 1e-9)
        assert found[0]["exchange"] == 0 < found[1]["exchange"] < found[2]["exchange"]
        longer = arithmetic.hours(target, "eagle3", 1, Run(answers=20_000), CARD)
        assert longer["writing"] == pytest.approx(2 * found[0]["writing"])
