"""Chooses, by measuring, the kernel of each linear product for each number of rows.

"library" is `F.linear` on the model's own weights. "packed" and "transposed" read a copy: oneDNN's blocked layout, and
Wᵀ. A copy costs memory, and each request must compare it with the weights. So a product has at most one, and none where
the library's kernel is within 3% of the fastest for every number of rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from msd.backends.packed import Packed
from msd.errors import UserError
from msd.system import machine
from msd.system.files import write_whole

ROWS = (1, 2, 4, 9, 17, 64)  # measured numbers of rows; n rows use the kernel of the largest of these up to n
KERNELS = ("library", "packed", "transposed")
MARGIN = 1.03
ROUNDS = 3
SAMPLE = 1 << 28  # bytes of weights that a measurement reads: more than caches hold, if the model has as many
FOLDER = Path(platformdirs.user_cache_dir("msd", appauthor=False)) / "kernels"

Kernels = tuple[str, ...]  # the kernel for each number of `ROWS`
Choice = dict[str, Kernels]  # name of a product, such as "qkv" -> its kernels
Linears = tuple[nn.Linear, ...]  # layers with the same input
PACKED: Kernels = ("packed",) * len(ROWS)
_measured: dict[Path, Choice] = {}  # by this process


def for_rows(kernels: Kernels, x: Tensor) -> str:
    """The entry of `kernels` for the number of rows of x [..., in]."""
    return kernels[bisect_right(ROWS, x.numel() // x.shape[-1]) - 1]


class Product:
    """y = x Wᵀ + b of one linear layer, or of several with the same input x, whose outputs are concatenated.

    dtype: of the packed product. copied: the model's weights and biases of which this product holds a copy.
    """

    def __init__(self, linears: Linears, kernels: Kernels = PACKED, dtype: torch.dtype = torch.float32) -> None:
        self._kernels = kernels
        self._own = [(linear.weight, linear.bias) for linear in linears]
        self._packed = Packed.of(*linears, dtype=dtype) if "packed" in kernels else None
        self._transposed = self._bias = None
        self.copied: list[Tensor] = []
        if set(kernels) != {"library"}:
            self.copied = [tensor for pair in self._own for tensor in pair if tensor is not None]
        if "transposed" in kernels:
            self._transposed = torch.cat([w.detach() for w, _ in self._own]).T.contiguous()
            self._bias = None if self._own[0][1] is None else torch.cat([b.detach() for _, b in self._own])

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        kernel = for_rows(self._kernels, x)
        if kernel == "packed":
            assert self._packed is not None
            return self._packed(x)
        if kernel == "transposed":
            assert self._transposed is not None
            return x @ self._transposed if self._bias is None else x @ self._transposed + self._bias
        outputs = [F.linear(x, weight, bias) for weight, bias in self._own]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, with `other` [..., out]."""
        if self._packed is not None and for_rows(self._kernels, x) == "packed":
            return self._packed.plus(x, other)
        return other + self(x)


def select(seconds: Mapping[str, Sequence[float]]) -> Kernels:
    """The kernels of one product, from the time of each kernel for each number of `ROWS`."""
    library = seconds["library"]
    best = [min(times) for times in zip(*seconds.values(), strict=True)]
    if all(own <= MARGIN * fastest for own, fastest in zip(library, best, strict=True)):
        return ("library",) * len(ROWS)

    def slowdown(copy: str) -> float:
        return sum(min(pair) / b for *pair, b in zip(library, seconds[copy], best, strict=True))

    copy = min(seconds.keys() - {"library"}, key=lambda name: (slowdown(name), name))
    return tuple("library" if own <= other else copy for own, other in zip(library, seconds[copy], strict=True))


@torch.inference_mode()
def measure(products: Sequence[Linears], clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Kernel -> seconds for each number of `ROWS`, for one product in all layers: the fastest of a few rounds.

    Runs through the layers, so that weights come from memory; alternates kernels, so that a disturbance affects all.
    """
    sizes = accumulate(sum(4 * linear.weight.numel() for linear in linears) for linears in products)
    sample = products[: max(1, sum(size <= SAMPLE for size in sizes))]
    variants = {kernel: [Product(linears, (kernel,) * len(ROWS)) for linears in sample] for kernel in KERNELS}
    seconds = {kernel: [float("inf")] * len(ROWS) for kernel in KERNELS}
    for _ in range(ROUNDS):
        for i, rows in enumerate(ROWS):
            x = torch.ones(1, rows, sample[0][0].in_features)
            for kernel, variant in variants.items():
                start = clock()
                for product in variant:
                    product(x)
                seconds[kernel][i] = min(seconds[kernel][i], clock() - start)
    return seconds


def remembered(key: tuple[object, ...], choose: Callable[[], Choice]) -> Choice:
    """The choice for `key` on this machine: from this process or the user's cache directory, or measured and stored.

    A choice that was measured while other processes used the cores is not stored on disk.
    """
    parts = (key, ROWS, KERNELS, machine.processor(), torch.get_num_threads(), torch.__version__)
    path = FOLDER / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"
    stored = _measured.get(path) or _stored(path)
    if stored is not None:
        return stored
    undisturbed, choice = machine.quietly(choose)
    _measured[path] = choice
    if undisturbed:
        with suppress(OSError, UserError):  # a cache that cannot be written is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(choice) + "\n")
    return choice


def _stored(path: Path) -> Choice | None:
    """An earlier choice; None where there is none, or the file is damaged."""
    try:
        choice = TypeAdapter(Choice).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    known = {*KERNELS, "fused", "plain"}
    return choice if choice and all(len(k) == len(ROWS) and known.issuperset(k) for k in choice.values()) else None
