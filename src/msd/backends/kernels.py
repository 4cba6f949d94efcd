"""Chooses, by measuring, the kernel of each linear product for each number of rows.

"library" is `F.linear` on the model's own weights, and "compiled" reads them in place too (`msd.backends.compiled`).
The others read a copy: "packed" in oneDNN's blocked layout, "transposed" Wᵀ, and "half" in float16, which is read in
half the time. "half" is only for weights that float16 holds exactly, as those of a checkpoint in 16 bits, so that its
products are float32's. A copy costs memory, and each request must compare it with the weights, which takes as long as
a pass over one row. So a product has at most one, and none unless it saves 5% over all numbers of rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.backends import compiled
from msd.backends.packed import Packed, Rounded, exact_exponent
from msd.system.machine import thread_clock

ROWS = (1, 2, 4, 9, 17, 64, 256)  # n rows use the kernel of the largest of these up to n
MEASURED = (1, 2, 4, 9, 17, 96, 256)  # numbers of rows that are timed for these; 96, as prompts have more than 64
KERNELS = ("library", "packed", "transposed", "half", "compiled")
COMPACT = ("packed", "half")
IN_PLACE = ("library", "compiled")  # the library's is first, which is for any weights
SAVING = 1.05
ROUNDS = 3
# bytes of each product's weights that a measurement reads; all products together are more than caches hold
SAMPLE, SAMPLE_OF_MANY_ROWS = 1 << 25, 1 << 22
MANY = 64  # rows from which the arithmetic takes longer than reading the weights

Kernels = tuple[str, ...]  # the kernel for each number of `ROWS`
Choice = dict[str, Kernels]  # name of a product, such as "qkv" -> its kernels
Weights = Sequence[tuple[Tensor, Tensor | None]]  # weight [out, in] and bias [out] of each such layer
Times = dict[str, list[float]]  # kernel -> seconds for each number of `ROWS`
PACKED: Kernels = ("packed",) * len(ROWS)


def for_rows(kernels: Kernels, x: Tensor) -> str:
    """The entry of `kernels` for the number of rows of x [..., in]."""
    return kernels[bisect_right(ROWS, x.numel() // x.shape[-1]) - 1]


class Product:
    """y = x Wᵀ + b of one linear layer, or of several with the same input x, whose outputs are concatenated.

    weights: of each layer; all have a bias, or none. dtype: of the packed product. copied: the tensors of `weights` of
    which this product holds a copy.
    """

    def __init__(self, weights: Weights, kernels: Kernels = PACKED, dtype: torch.dtype = torch.float32) -> None:
        self._kernels, self._own = kernels, list(weights)
        matrices, biases = [w for w, _ in weights], [b for _, b in weights if b is not None]
        self._packed: Packed | None = None
        if "packed" in kernels:
            self._packed = Packed(matrices, biases, dtype)
        elif "half" in kernels:  # weights that have changed since the measurement may need all their bits
            e = exact_exponent(matrices)
            self._packed = Packed(matrices, biases) if e is None else Rounded(matrices, biases, e)
        self._transposed = self._bias = None
        self.copied: list[Tensor] = [] if set(kernels) <= set(IN_PLACE) else [*matrices, *biases]
        if "transposed" in kernels:
            self._transposed = torch.cat([w.detach().T for w in matrices], 1)
            self._bias = torch.cat([b.detach() for b in biases]) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        kernel = for_rows(self._kernels, x)
        if kernel in COMPACT:
            assert self._packed is not None
            return self._packed(x)
        if kernel == "transposed":
            assert self._transposed is not None
            return x @ self._transposed if self._bias is None else x @ self._transposed + self._bias
        matrices = [weight for weight, _ in self._own]
        if kernel == "compiled" and compiled.can_compile(matrices):  # they may have changed since the measurement
            y, biases = compiled.product(x, matrices), [b for _, b in self._own if b is not None]
            return y.add_(torch.cat(biases)) if biases else y
        outputs = [F.linear(x, weight, bias) for weight, bias in self._own]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, with `other` [..., out]."""
        if self._packed is not None and for_rows(self._kernels, x) in COMPACT:
            return self._packed.plus(x, other)
        return other + self(x)


def select(seconds: Mapping[str, Sequence[float]]) -> Kernels:
    """The kernels of one product, from the time of each kernel for each number of `ROWS`."""
    free = [name for name in IN_PLACE if name in seconds]
    best = [min(times) for times in zip(*seconds.values(), strict=True)]

    def fastest(among: Sequence[str]) -> list[tuple[float, str]]:
        """For each number of rows; of equal ones the first."""
        return [min(((seconds[name][i], name) for name in among), key=lambda pair: pair[0]) for i in range(len(best))]

    def slowdown(among: Sequence[str]) -> float:
        return sum(time / b for (time, _), b in zip(fastest(among), best, strict=True))

    copies = [[*free, name] for name in seconds if name not in free]
    chosen = min((free, *copies), key=lambda among: (slowdown(among), among[-1]))
    if slowdown(free) <= SAVING * slowdown(chosen):
        chosen = free
    return tuple(name for _, name in fastest(chosen))


@torch.inference_mode()
def measure(products: Mapping[str, Sequence[Weights]], clock: Callable[[], float] = thread_clock) -> dict[str, Times]:
    """The times of each product, given its weights in each layer: the fastest of a few rounds.

    Reads a sample of the weights; those that float16 holds exactly have "half" too. Alternates products and kernels, so
    that weights come from memory and a disturbance affects all.
    """
    few = {name: list(_variants(layers, SAMPLE)) for name, layers in products.items()}
    many = {name: list(_variants(layers, SAMPLE_OF_MANY_ROWS)) for name, layers in products.items()}
    seconds = {name: {kernel: [math.inf] * len(ROWS) for kernel, *_ in sample} for name, sample in few.items()}
    for _ in range(ROUNDS):
        for i, rows in enumerate(ROWS):
            for name, sample in (few if rows < MANY else many).items():
                x = torch.ones(1, MEASURED[i], products[name][0][0][0].shape[1])
                for kernel, *variant in sample:
                    start = clock()
                    for product in variant:
                        product(x)
                    seconds[name][kernel][i] = min(seconds[name][kernel][i], clock() - start)
    return seconds


def _variants(layers: Sequence[Weights], most: int) -> Iterator[tuple[Any, ...]]:
    """Yields (kernel, its product in each of the first layers), of at most that many bytes of weights.

    Where a single layer has more, the first rows of its weights are used.
    """
    size = sum(weight.numel() * weight.element_size() for weight, _ in layers[0])
    share = min(1.0, most / size)
    sample = [
        [(w[: (n := math.ceil(share * len(w)))], b if b is None else b[:n]) for w, b in layer]
        for layer in layers[: max(1, most // size)]
    ]
    weights = [w for layer in sample for w, _ in layer]
    possible = {"half": exact_exponent(weights) is not None, "compiled": compiled.can_compile(weights)}
    for kernel in KERNELS:
        if possible.get(kernel, True):
            yield (kernel, *(Product(layer, (kernel,) * len(ROWS)) for layer in sample))
