"""`msd estimate` for every architecture: counts equal those of a real pass, and default configs have an estimate."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from families import BY_NAME, NAMES, SAMPLE
from family_layouts import WORDS
from msd.cli import main
from msd.estimate import Acceptance, Card, Sizes, Workload, pass_seconds, plans
from msd.estimate.counts import Counts
from msd.estimate.sizes import of_config
from msd.targets import supported
from msd.targets.taps import text_decoder

DEFAULTS = [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in supported()]
CARD = Card("toy", 1e9, 1e12, 1e9, step=0.0, dtype_bytes=2.0, measured=True, touch=0.0)


def flops(model: Any, cache: Any) -> tuple[int, int]:
    """FLOPs of (all decoder layers, the mixers of recurrent ones) in a pass over one token."""
    model.set_attn_implementation("eager")  # the counter does not see into fused kernels
    model.set_experts_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.get_decoder()(input_ids=torch.tensor([[WORDS]]), past_key_values=cache, use_cache=True)
    counts = {path: sum(found.values()) for path, found in counter.get_flop_counts().items()}
    states = [i for i, layer in enumerate(cache.layers) if getattr(layer, "conv_states", None)]
    part = rf"\.layers\.({'|'.join(map(str, states))})\.(linear_attn|conv|short_conv|mixer)" if states else "$^"
    return tuple(
        sum(n for path, n in counts.items() if re.search(wanted + "$", path)) for wanted in (r"\.layers\.\d+", part)
    )


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_a_pass(name: str) -> None:
    """Of one token that attends to itself: 2 FLOPs for each weight it uses, and those of attention."""
    model = BY_NAME[name].make()
    counts = of_config(name, model.config).counts
    decoder, cache = text_decoder(model), DynamicCache(config=text_decoder(model).config)
    everything, mixers = flops(model, cache)
    keys = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    states = [x for layer in cache.layers for kind in ("conv_states", "recurrent_states")
              for x in getattr(layer, kind, {}).values() if x is not None]  # fmt: skip
    assert counts.kept == sum(layer.keys.numel() + layer.values.numel() for layer in keys)
    assert counts.states == sum(x.numel() for x in states)
    assert counts.layers == len(decoder.layers) and bool(counts.recurrent) == bool(states) == bool(mixers)
    used = counts.experts if name == "llama4" else counts.active  # its code runs all experts on every token
    # apart from gates, norms with a matrix, and latent keys, which attention reads in part
    assert everything - mixers == pytest.approx(2 * (counts.dense - counts.mixers + used) + counts.attention, rel=0.015)


def test_a_mixture_of_experts_by_hand() -> None:
    """4 experts of 1000 weights, of which a token uses one: 9 tokens leave each unused with probability 0.75 ** 9."""
    counts = Counts(1, 500, 0, 0, 0, experts=4000, active=1000)
    sizes = Sizes("experts", 1, 10, 10, 1, 1, 10, 0, counted=counts)
    for rows in (1, 9):
        read = 500 + 4000 * (1 - 0.75**rows)
        products = hypot(2 * read / 1e9, 2 * 1500 * rows / 1e12)
        assert pass_seconds(sizes, CARD, rows, 0) == pytest.approx(products)
    assert counts.weights(1) == 1500 and sizes.decoder == 4500


def test_a_hybrid_by_hand() -> None:
    """Each level reads the mixers again; each node reads a state of 100 numbers and writes one."""
    counts = Counts(4, 5000, 0, 0, 0, recurrent=3, mixers=600, states=100)
    sizes = Sizes("hybrid", 4, 10, 10, 1, 1, 10, 0, counted=counts)
    slow = replace(CARD, step=1e-6)
    products = hypot(2 * (5000 + 2 * 600) / 1e9, 2 * 5000 * 9 / 1e12)
    steps = 12 * (4 + 3 * 2) * 1e-6
    assert pass_seconds(sizes, slow, 9, 0, levels=3) == pytest.approx(products + 2 * 2 * 100 * 9 / 1e9 + steps)
    alone = hypot(2 * 5000 / 1e9, 2 * 5000 / 1e12) + 2 * 2 * 100 / 1e9 + 12 * 4 * 1e-6
    assert pass_seconds(sizes, slow, 1, 0) == pytest.approx(alone)
    (row,) = plans(sizes, slow, Acceptance(length=2.0), Workload(100, 0, 100, 2), [8], [1])
    assert row["verify_s"] == pytest.approx(pass_seconds(sizes, slow, 9, 150, levels=3))


@pytest.mark.parametrize(
    ("name", "total", "active"), [("kimi_k25", 671, 37), ("llama4", 109, 17), ("qwen3_5_moe", 35, 3)]
)
def test_default_configs_have_the_published_numbers_of_weights(name: str, total: int, active: int) -> None:
    """In billions: DeepSeek-V3's, of which Kimi's default config has the sizes; Llama 4 Scout's; Qwen3.5-35B-A3B's."""
    sizes = of_config(name, AutoConfig.for_model(name))
    used = sizes.counts.dense + sizes.counts.active + 2 * sizes.head  # with the embedding
    assert sizes.model / 1e9 == pytest.approx(total, rel=0.02) and used / 1e9 == pytest.approx(active, rel=0.16)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_configs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An estimate, or one line where the library itself cannot build the model from its default config."""
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--target", str(tmp_path), "--json"])
    out, error = capsys.readouterr()
    if stop.value.code == 2:
        assert not out and error.count("\n") == 1 and "from its config" in error
        return
    found = json.loads(out)
    counts = found["target"]["counted"]
    assert stop.value.code == 0 and not error and 0 < counts["dense"] < found["target"]["total"]
    for row in found["rows"]:
        assert 0 < row["plain_s"] <= row["verify_s"] < 1.2 * (row["nodes"] + 1) * row["plain_s"]
        assert 0 < row["speedup_decode"] < 3.5
