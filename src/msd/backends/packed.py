"""Linear layers whose weights are packed once into oneDNN's blocked memory layout.

`F.linear` passes a row-major weight to the kernel in each call, which costs more than the product itself for a few
rows: a target pass over 8 rows takes about twice as long as one over a single row. With packed weights both take about
the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROWS = 8  # oneDNN chooses the layout for this number of rows; other numbers use it too


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
        """Packs layers together. Either all have a bias, or none has."""
        return cls([x.weight for x in linears], [x.bias for x in linears if x.bias is not None], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out] in the dtype of x."""
        if x.dtype != self.dtype:
            return self(x.to(self.dtype)).to(x.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, with `other` [..., out]; the kernel adds it where x has the dtype of the product."""
        if x.dtype != self.dtype:
            return other + self(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return out


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
        """other + y, with `other` [..., out]; in one operator where it is packed."""
        if self._packed is not None and not torch.is_grad_enabled():
            return self._packed.plus(x, other)
        return other + self(x)


def faster_in_bf16(device: torch.device, tokens: int = 1024, tries: int = 5) -> bool:
    """Whether a product of `tokens` rows with a weight [1536, 576] is at least 1.2 times as fast in bfloat16 here."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(tokens, 576, dtype=dtype, device=device), torch.ones(1536, 576, dtype=dtype, device=device)
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            float((a @ b.T)[0, 0])
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) * 1.2 < seconds(torch.float32)
