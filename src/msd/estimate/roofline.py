"""Cards: how fast they read memory and multiply. Numbers of their data sheets, or of this machine by a short probe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot

from msd.estimate.sizes import Sizes

REACHED_BANDWIDTH, REACHED_FLOPS = 0.8, 0.6  # assumed shares of a data sheet's numbers that kernels reach
LAUNCH = 4e-6  # seconds from one kernel to the next on a GPU, assumed


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes a second. flops: FLOP a second of dense products in `dtype_bytes` bytes a number.

    memory: bytes. step: seconds that an operator costs beside its work. measured: by a probe, not from a data sheet.
    attention: FLOP a second of masked attention, that of products by default. touch: seconds that element-wise work
    takes for one number, what moving it takes by default.
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
        """With what kernels reach in the place of what a data sheet says."""
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
