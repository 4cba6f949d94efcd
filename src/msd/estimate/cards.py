"""Cards: how fast they read memory and multiply. Numbers of their data sheets, or of this machine by a short probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from msd.errors import UserError

REACHED_BANDWIDTH, REACHED_FLOPS = 0.8, 0.6  # assumed shares of a data sheet's numbers that kernels reach
LAUNCH = 4e-6  # seconds from one kernel to the next on a GPU, assumed


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes a second. flops: FLOP a second of dense products in `dtype_bytes` bytes a number.

    memory: bytes. step: seconds that an operator costs beside its work. measured: by a probe, not from a data sheet.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    step: float = LAUNCH
    dtype_bytes: float = 2.0
    measured: bool = False
    source: str = ""

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


def card(name: str) -> Card:
    """A card by name, or "cpu", this machine, measured now (about a second). UserError names those known."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key == "cpu":
        return probe()
    key = {"h100-sxm": "h100", "a100": "a100-80", "4090": "rtx-4090", "3090": "rtx-3090"}.get(key, key)
    if key not in CARDS:
        known = ", ".join(["cpu", *(card.name for card in CARDS.values())])
        raise UserError(f"unknown card '{name}'; known: {known}")
    return CARDS[key]


def probe() -> Card:
    """This machine in float32: weights of 168 MB read for one row, and multiplied with 256 rows.

    Packed for oneDNN where that goes, as the fused backend has them. step: what a small operator takes.
    """
    import torch
    import torch.nn.functional as F

    from msd.backends.packed import Packed, can_pack

    weights = [torch.randn(2048, 640) for _ in range(32)]
    numbers = sum(w.numel() for w in weights)
    products: list[Callable[[torch.Tensor], torch.Tensor]] = [
        Packed([w]) if can_pack(w) else partial(F.linear, weight=w) for w in weights
    ]
    few, many, small = torch.randn(1, 640), torch.randn(256, 640), torch.randn(1, 640)

    def seconds(run: Callable[[], object], times: int) -> float:
        run()
        found = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return median(found)

    with torch.inference_mode():
        step = seconds(lambda: [F.rms_norm(small, (640,)) for _ in range(100)], 9) / 100
        narrow = seconds(lambda: [product(few) for product in products], 9) - len(products) * step
        wide = seconds(lambda: [product(many) for product in products], 3)
    import psutil

    return Card(
        "cpu", 4 * numbers / max(narrow, 1e-6), 2 * 256 * numbers / wide, float(psutil.virtual_memory().total), step,
        4.0, True, f"measured, {torch.get_num_threads()} threads",
    )  # fmt: skip
