"""Estimates the seconds of a pass from a model's sizes and a card's bandwidth and FLOP/s: a roofline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot

from msd.estimate.sizes import Sizes

REACHED_BANDWIDTH, REACHED_FLOPS = 0.8, 0.6  # shares of a data sheet's figures that kernels reach (assumed)
LAUNCH = 4e-6  # seconds from one kernel to the next on a GPU (assumed)
STEPS = 12  # operators of a decoder layer in the fused backend


@dataclass(frozen=True)
class Card:
    """The speed of a GPU or CPU.

    bandwidth: bytes per second. flops: FLOP/s of dense products in the dtype, `dtype_bytes` bytes per number. memory:
    bytes. step: overhead of one operator in seconds. measured: by `probe`, instead of taken from a data sheet.
    attention: FLOP/s of masked attention, by default `flops`. touch: seconds of element-wise work per number, by
    default the time to move it.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    step: float = LAUNCH
    dtype_bytes: float = 2.0
    measured: bool = False
    source: str = ""
    attention: float | None = None
    touch: float | None = None

    def reached(self) -> Card:
        """Returns the card with the speed that kernels reach, instead of the data sheet's."""
        if self.measured:
            return self
        return replace(self, bandwidth=self.bandwidth * REACHED_BANDWIDTH, flops=self.flops * REACHED_FLOPS)


def _sheet(name: str, gigabytes_s: float, teraflops: float, gigabytes: float, source: str) -> Card:
    return Card(name, gigabytes_s * 1e9, teraflops * 1e12, gigabytes * 1e9, source=source)


# dense (without sparsity) bfloat16 with float32 accumulation; float16 where a card has no bfloat16
_SHEETS = (
    _sheet("H100", 3350, 989, 80, "NVIDIA H100 data sheet, SXM5"),
    _sheet("H100-PCIe", 2000, 756, 80, "NVIDIA H100 data sheet, PCIe"),
    _sheet("H200", 4800, 989, 141, "NVIDIA H200 data sheet, SXM"),
    _sheet("A100-40", 1555, 312, 40, "NVIDIA A100 data sheet, 40 GB"),
    _sheet("A100-80", 2039, 312, 80, "NVIDIA A100 data sheet, 80 GB SXM"),
    _sheet("L40S", 864, 362, 48, "NVIDIA L40S data sheet"),
    _sheet("L4", 300, 121, 24, "NVIDIA L4 data sheet"),
    _sheet("RTX-4090", 1008, 165.2, 24, "NVIDIA Ada architecture paper, appendix A"),
    _sheet("RTX-3090", 936, 71, 24, "NVIDIA GA102 architecture paper, appendix A"),
    _sheet("T4", 320, 65, 16, "NVIDIA T4 data sheet; float16"),
)
CARDS = {card.name.lower(): card for card in _SHEETS}


def pass_seconds(
    sizes: Sizes, card: Card, rows: int, context: int, batch: int = 1, weight_bytes: float | None = None,
    layers: int | None = None, head: int | None = None, head_rows: int | None = None, levels: int | None = None,
) -> float:  # fmt: skip
    """Estimates the seconds of one pass over `rows` tokens after `context` tokens, in each of `batch` sequences.

    weight_bytes: bytes per weight, by default those of the card's dtype; products and cache always have that dtype.
    layers: of a decoder of that many equal layers, by default of the model's own. head: weights of the output layer.
    head_rows: rows of each sequence that the output layer computes, all by default. levels: of the tree whose nodes
    the rows are, with the root; by default the rows are one sequence. Recurrent layers run once for each level.
    """
    real = card.reached()
    sizes = sizes if layers is None else sizes.uniform(layers)
    counts = sizes.counts
    head = sizes.head if head is None else head
    weight_bytes = real.dtype_bytes if weight_bytes is None else weight_bytes
    tokens, head_tokens = batch * rows, batch * (rows if head_rows is None else head_rows)
    again = 0 if levels is None else levels - 1
    read = counts.weights(tokens) + counts.mixers * again + head
    flops = 2 * ((counts.dense + counts.active) * tokens + head * head_tokens)
    products = hypot(read * weight_bytes / real.bandwidth, flops / real.flops)
    states = 2 * counts.states * (1 if levels is None else rows)
    cache = batch * ((context + rows) * counts.read + states) * real.dtype_bytes / real.bandwidth
    attention = hypot(cache, batch * attention_work(sizes, rows, context) / (real.attention or real.flops))
    touch = real.dtype_bytes / real.bandwidth if real.touch is None else real.touch
    steps = (counts.layers + counts.recurrent * again) * STEPS
    return products + attention + steps * real.step + batch * touched(sizes, rows) * touch


def attention_work(sizes: Sizes, rows: int, context: int) -> float:
    """Returns the FLOPs of attention over `rows` rows after `context` tokens; a row sees half of the other rows."""
    return sizes.counts.attention * rows * (context + (rows + 1) / 2)


def touched(sizes: Sizes, rows: int) -> float:
    """Returns how many numbers element-wise work (norms, rotary positions, gate) reads or writes in a pass."""
    return sizes.layers * rows * (8 * sizes.hidden + 6 * sizes.intermediate)


def prefill_seconds(
    sizes: Sizes, card: Card, prompt: int, images: int, batch: int = 1, weight_bytes: float | None = None
) -> float:
    """Estimates the seconds of a prompt of `prompt` tokens, including its images if the vision tower is known."""
    real = card.reached()
    patches = batch * images * sizes.vision_patches
    attention = 4 * sizes.vision_layers * sizes.vision_hidden * patches * sizes.vision_patches
    read = sizes.vision * (real.dtype_bytes if weight_bytes is None else weight_bytes) if images else 0.0
    encoding = hypot(read / real.bandwidth, (2 * sizes.vision * patches + attention) / real.flops)
    return encoding + pass_seconds(sizes, card, prompt, 0, batch, weight_bytes, head_rows=1)
