"""The time of a pass: bytes read against FLOPs done.

    t = sqrt(t_read² + t_multiply²) + steps · t_step

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
    cached = batch * (context + rows) * sizes.kv * layers / sizes.layers * real.dtype_bytes
    read = (linear + head) * each + cached
    seen = context + (rows + 1) / 2  # keys that a row sees, in the mean
    attention = 4 * layers * sizes.heads * sizes.head_dim * tokens * seen
    shown = batch * (rows if head_rows is None else head_rows)
    work = 2 * linear * tokens + 2 * head * shown + attention
    return hypot(read / real.bandwidth, work / real.flops) + layers * STEPS * real.step


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
