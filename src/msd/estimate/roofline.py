"""The time of a pass: bytes read against FLOPs done, for its products and for its attention, and what comes on top.

    t = root(weights read, products) + root(cache read, attention) + operators + element-wise work
    root(a, b) = sqrt(a² + b²)

A roofline takes the larger of the two. Near the ridge, where drafts are verified, a pass takes longer than either
alone, and the root of squares fits measured passes there (docs/estimate.md); far from it the two forms agree.
"""

from __future__ import annotations

from math import hypot

from msd.estimate.cards import Card
from msd.estimate.sizes import Sizes

STEPS = 12  # operators of a decoder layer, as the fused backend has them


def pass_seconds(
    sizes: Sizes, card: Card, rows: int, context: int, batch: int = 1, weight_bytes: float | None = None,
    layers: int | None = None, head: int | None = None, head_rows: int | None = None,
) -> float:  # fmt: skip
    """Seconds of one pass over `rows` tokens of each of `batch` sequences, after `context` tokens of each.

    weight_bytes: of a number of the weights, the card's own by default; products and cache stay in the card's type.
    layers: all by default. head: weights of the output layer; head_rows: rows of each sequence that go through it.
    """
    real = card.reached()
    layers = sizes.layers if layers is None else layers
    head = sizes.head if head is None else head
    each = real.dtype_bytes if weight_bytes is None else weight_bytes
    linear, tokens = layers * sizes.layer, batch * rows
    shown = batch * (rows if head_rows is None else head_rows)
    products = hypot((linear + head) * each / real.bandwidth, 2 * (linear * tokens + head * shown) / real.flops)
    part = batch * layers / sizes.layers
    cache = part * (context + rows) * sizes.kv * real.dtype_bytes / real.bandwidth
    attention = hypot(cache, part * attention_work(sizes, rows, context) / (real.attention or real.flops))
    touch = real.dtype_bytes / real.bandwidth if real.touch is None else real.touch
    return products + attention + layers * STEPS * real.step + part * touched(sizes, rows) * touch


def attention_work(sizes: Sizes, rows: int, context: int) -> float:
    """FLOPs of attention in a pass over `rows` rows after `context` tokens, of which a row sees half of its fellows."""
    return 4 * sizes.layers * sizes.heads * sizes.head_dim * rows * (context + (rows + 1) / 2)


def touched(sizes: Sizes, rows: int) -> float:
    """Numbers that element-wise work reads or writes in a pass: norms, rotary positions, the gate."""
    return sizes.layers * rows * (8 * sizes.hidden + 6 * sizes.intermediate)


def prefill_seconds(
    sizes: Sizes, card: Card, prompt: int, images: int, batch: int = 1, weight_bytes: float | None = None
) -> float:
    """Seconds of a prompt of `prompt` tokens in all, and of encoding its images, where the encoder is known."""
    real = card.reached()
    patches = batch * images * sizes.eye_patches
    attention = 4 * sizes.eye_layers * sizes.eye_hidden * patches * sizes.eye_patches
    read = sizes.eye * (real.dtype_bytes if weight_bytes is None else weight_bytes) if images else 0.0
    eye = hypot(read / real.bandwidth, (2 * sizes.eye * patches + attention) / real.flops)
    return eye + pass_seconds(sizes, card, prompt, 0, batch, weight_bytes, head_rows=1)
