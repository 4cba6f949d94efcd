"""Linear layers whose weights are packed once into the memory layout of the kernel that multiplies them.

`F.linear` passes a row-major weight to the kernel in each call, which costs more than the product itself for a few
rows: a target pass over 8 rows takes about twice as long as one over a single row. With packed weights both take about
the same time.

Weights of 16 bits are read in half the time. bfloat16 (oneDNN) rounds the inputs too and is for drafts; float16
(compiled for this CPU, or FBGEMM) leaves the inputs as they are.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends import compiled

ROWS = 8  # oneDNN chooses the layout for this number of rows; other numbers use it too
FBGEMM = "fbgemm"
MANY = 512  # rows beyond which the library is faster, although weights of 16 bits are converted in each call
AT_ONCE = 64  # rows of a weight that are compared at once; the first ones tell most weights without an exponent
TRIES = 20  # of each dtype that could be fastest


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack this weight: a float32 matrix, not quantised, on a CPU with oneDNN."""
    return (
        type(weight) in (Tensor, nn.Parameter)  # quantised weights are subclasses with dtype float32
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Packed:
    """y = x Wᵀ + b of one linear layer, or of several with the same input x, whose outputs are concatenated.

    dtype: of the product: float32, or bfloat16, which rounds x and W and is for drafts only.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        whole = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole.to(dtype).contiguous(), ROWS)
        self.bias = torch.cat([b.detach() for b in biases]).to(dtype) if biases else None

    @classmethod
    def of(cls, *linears: nn.Linear, dtype: torch.dtype = torch.float32) -> Packed:
        """Packs layers together, in float16 as `Rounded`. Either all have a bias, or none has."""
        weights, biases = [x.weight for x in linears], [x.bias for x in linears if x.bias is not None]
        return Rounded(weights, biases) if dtype == torch.float16 else cls(weights, biases, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out] in the dtype of x."""
        if x.dtype != self.dtype:
            return self(x.to(self.dtype)).to(x.dtype)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """y, for an x in the dtype of the product."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, with `other` [..., out]; the kernel adds it where x has the dtype of the product."""
        if x.dtype != self.dtype:
            return other + self(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return out


class Rounded(Packed):
    """`Packed` with weights in float16, inputs and outputs in float32, and products in float32 (compiled, or FBGEMM).

    exponent: the weights are stored times 2^exponent, by which the outputs are divided. With that of `exact_exponent`
    nothing is rounded, and the product is that of float32; otherwise it is for drafts only.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), exponent: int = 0) -> None:
        self.dtype, self.factor = torch.float32, 2.0**-exponent
        whole = torch.cat([w.detach() for w in weights]) * 2.0**exponent
        self.bias = torch.cat([b.detach() for b in biases]) if biases else None
        self.weight: Any = whole.half()
        self._compiled = compiled.can_compile([self.weight], torch.float16)
        if not self._compiled:
            with _fbgemm():
                self.weight = torch.ops.quantized.linear_prepack_fp16(whole, None)

    def _product(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        out: Tensor
        if not self._compiled:
            out = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        elif x.numel() > MANY * x.shape[-1]:
            out = F.linear(x, self.weight.float())
        else:
            out = compiled.product(x, [self.weight])
        out = out if self.factor == 1.0 else out.mul_(self.factor)
        return out if self.bias is None else out.add_(self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See `Packed`."""
        return other + self(x)


def exact_exponent(weights: Sequence[Tensor]) -> int | None:
    """Returns an exponent e for which float16 holds each weight times 2^e exactly; None if there is none, or no FBGEMM.

    Checkpoints in float16 have 0. Nearly all in bfloat16 have one: their weights have 8 significant bits of the 11, and
    those of a matrix span less than float16's 40 powers of two.
    """
    if not (rounds() and all(can_pack(w) for w in weights)):
        return None
    largest = max(float(torch.linalg.vector_norm(w.detach(), torch.inf)) for w in weights)
    if not 0.0 < largest < math.inf:
        return None
    for exponent in (0, 15 - math.frexp(largest)[1]):
        scaled = (part * 2.0**exponent for w in weights for part in w.detach().split(AT_ONCE))
        if all(torch.equal(part.half().float(), part) for part in scaled):
            return exponent
    return None


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Packs for FBGEMM, whatever the engine of quantised models; hides PyTorch's plan to move these to a package."""
    engine = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.quantized.engine = FBGEMM
            yield
    finally:
        torch.backends.quantized.engine = engine


class Linear(nn.Linear):
    """A linear layer that can be packed for inference. Its weights must not change after `pack`."""

    _packed: Packed | None = None

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """Packs the weight, for products in `dtype`, where oneDNN supports it."""
        self._packed = Packed.of(self, dtype=dtype) if can_pack(self.weight) else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]; packed only without gradients."""
        if self._packed is not None and not torch.is_grad_enabled():
            return self._packed(x)
        return super().forward(x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """other + y, with `other` [..., out]; in one operator where oneDNN adds it."""
        if self._packed is not None and not torch.is_grad_enabled():
            return self._packed.plus(x, other)
        return other + self(x)


@lru_cache
def draft_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which a draft's products are fastest on this device, measured once: see `Packed.of`.

    Without AVX512 it is float16, which accepts as many tokens as float32.
    """
    if device.type != "cpu":
        return torch.bfloat16 if faster_in_bf16(device, tokens=ROWS) else torch.float32
    rounded = [dtype for dtype, here in ((torch.bfloat16, multiplies_in_bf16()), (torch.float16, rounds())) if here]
    if not rounded:
        return torch.float32
    linear, x = nn.Linear(576, 4096, bias=False), torch.ones(ROWS, 576)
    products = {dtype: Packed.of(linear, dtype=dtype) for dtype in (torch.float32, *rounded)}
    seconds = dict.fromkeys(products, math.inf)
    with torch.inference_mode():
        for _ in range(TRIES):
            seconds = {dtype: min(seconds[dtype], _seconds(product, x)) for dtype, product in products.items()}
    best = min(rounded, key=seconds.__getitem__)
    return best if seconds[best] * 1.1 < seconds[torch.float32] else torch.float32


def _seconds(product: Packed, x: Tensor) -> float:
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start


def rounds() -> bool:
    """Whether this CPU has FBGEMM's products (AVX2), and this PyTorch still has them."""
    return (
        torch.backends.mkldnn.is_available()
        and FBGEMM in torch.backends.quantized.supported_engines
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    )


def multiplies_in_bf16() -> bool:
    """Whether oneDNN has bfloat16 products on this CPU; without AVX512 it has none, and packing for them fails."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def faster_in_bf16(device: torch.device, tokens: int = 1024, tries: int = 5) -> bool:
    """Whether a product of `tokens` rows with a weight [1536, 576] is at least 1.2 times as fast in bfloat16 here.

    False on a CPU that only emulates it, whatever the measured times: another process can distort them.
    """
    if device.type == "cpu" and not multiplies_in_bf16():
        return False

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(tokens, 576, dtype=dtype, device=device), torch.ones(1536, 576, dtype=dtype, device=device)
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            float((a @ b.T)[0, 0])
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) * 1.2 < seconds(torch.float32)
