"""Measures this machine as a `Card`, in float32, with passes of a small decoder and with its matrix products alone.

The decoder has 160 MB of weights, more than any CPU cache. It runs on the fused backend with the fastest kernels, where
that is possible. Products over 1 row give the bandwidth, over 64 rows the FLOP/s. The remaining time of a pass is due
to operators, element-wise work and attention; passes over more rows and more keys separate the three.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from msd.backends.fused import FusedDecoder, UnsupportedDecoderError, kernel_choice
from msd.core.cache import KVCache
from msd.estimate.roofline import STEPS, Card, attention_work, touched
from msd.estimate.sizes import Sizes

SIZES = Sizes("probe", 8, 640, 1792, 10, 5, 64, 0)
ROWS, NEAR, FAR = 64, 64, 576  # rows of a pass; numbers of keys before it
TIMES = 15


@torch.inference_mode()
def probe() -> Card:
    """Measures this machine, which takes some seconds."""
    decoder, products = _decoder()
    weights = SIZES.layers * SIZES.layer
    few, many = (_seconds(partial(products, rows)) for rows in (1, ROWS))
    alone, wide, far = (_seconds(_pass(decoder, rows, keys)) for rows, keys in ((1, NEAR), (ROWS, NEAR), (ROWS, FAR)))
    bandwidth, flops = 4 * weights / few, 2 * ROWS * weights / many
    attention = attention_work(SIZES, ROWS, FAR) - attention_work(SIZES, ROWS, NEAR)
    rate = attention / max(far - wide, 1e-5)
    step = max(alone - few, 1e-6) / (SIZES.layers * STEPS)
    rest = wide - many - (alone - few) - attention_work(SIZES, ROWS, NEAR) / rate
    return Card(
        "cpu", bandwidth, flops, float(psutil.virtual_memory().total), step, 4.0, True,
        f"measured, {torch.get_num_threads()} threads", rate, max(rest, 0.0) / touched(SIZES, ROWS - 1),
    )  # fmt: skip


def _decoder() -> tuple[Any, Callable[[int], None]]:
    """Returns (the decoder's forward, a function that computes only its matrix products over a number of rows)."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=SIZES.hidden, intermediate_size=SIZES.intermediate, num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads, num_key_value_heads=SIZES.kv_heads, head_dim=SIZES.head_dim,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    try:
        fused = FusedDecoder(model, kernels=kernel_choice(model))
    except UnsupportedDecoderError:
        linears = [m for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]

        def plain(rows: int) -> None:
            for linear in linears:
                linear(torch.ones(1, rows, linear.in_features))

        return model, plain

    def fastest(rows: int) -> None:
        narrow, wide = torch.ones(1, rows, SIZES.hidden), torch.ones(1, rows, SIZES.intermediate)
        for layer in fused.layers:
            layer.qkv(narrow)
            layer.out.plus(narrow, narrow)
            layer.gate_up(narrow)
            layer.down.plus(wide, narrow)

    return fused.forward, fastest


def _pass(forward: Any, rows: int, keys: int) -> Callable[[], object]:
    """Returns a function that runs a pass over `rows` tree nodes, which all attend to `keys` earlier tokens."""
    cache = KVCache(SIZES.layers, 1, keys + rows)
    forward(inputs_embeds=torch.ones(1, keys, SIZES.hidden), past_key_values=cache)
    cache.advance(keys)
    mask: Tensor | None = torch.zeros(1, 1, rows, keys + rows) if rows > 1 else None
    positions = torch.arange(keys, keys + rows)[None]
    x = torch.ones(1, rows, SIZES.hidden)
    return lambda: forward(inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache)


def _seconds(run: Callable[[], object]) -> float:
    """Returns the median time of several runs, after a warm-up."""
    run()
    return median(timeit.repeat(run, number=1, repeat=TIMES))
