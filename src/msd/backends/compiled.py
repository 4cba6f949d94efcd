"""Products of a few rows that read a weight in place and only once, by code that is compiled for this CPU.

The libraries' kernels for matrices take up to twice as long for 8 rows as for one, although both read the same weights,
which is most of the time; here 8 rows take 1.2 times as long as one (docs/backends.md). The code is written by
`msd.backends.microkernel`, compiled by LLVM, and runs on the threads of PyTorch (OpenMP). A row of the result does not
depend on the other rows, not even in its last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msd.backends.microkernel import Registers, assembly

try:
    import llvmlite.binding as llvm
except ImportError:  # no wheel for this platform
    llvm = None

MAPS = Path("/proc/self/maps")
PLAIN = (Tensor, nn.Parameter)  # quantised weights are subclasses with dtype float32
STORED = {torch.float32: "float", torch.float16: "half"}
SYMBOLS = ("omp_get_thread_num", "omp_get_num_threads")
_engines: list[Any] = []  # which own the compiled code


@lru_cache
def registers() -> Registers | None:
    """Returns the vector registers of this CPU; None where products cannot be compiled."""
    if llvm is None or _openmp() is None:
        return None
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Registers(lanes=16, sums=24, rows=8)
    if all(features.get(name) for name in ("avx2", "fma", "f16c")):
        return Registers(lanes=8, sums=12, rows=6)
    return None


def can_compile(weights: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether there is a product with these weights: matrices of `dtype` in memory row by row, of whole vectors."""
    own = registers()
    return own is not None and all(
        type(w) in PLAIN
        and w.is_cpu
        and w.dtype == dtype
        and w.dim() == 2
        and w.is_contiguous()
        and w.shape[1] % own.lanes == 0 < w.shape[1]
        for w in weights
    )


def product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Returns x Wᵀ for each weight, concatenated: x [..., in] -> [..., out], both float32.

    The weights `can_compile`, all in float32 or all in float16.
    """
    own, parallel = registers(), _openmp()
    assert own is not None and parallel is not None
    x = x.contiguous()
    width = x.shape[-1]
    rows, outputs = x.numel() // width, [len(w) for w in weights]
    y = x.new_empty(*x.shape[:-1], sum(outputs))
    if not rows:
        return y
    parts = -(-rows // own.rows)
    largest = -(-rows // parts)
    smaller = parts * largest - rows
    # in the order of `microkernel.FIELDS`, then of `WEIGHT`
    fields = [x.data_ptr(), y.data_ptr(), y.shape[-1], parts - smaller, smaller, len(weights)]
    column = 0
    for weight, count in zip(weights, outputs, strict=True):
        fields += [weight.data_ptr(), count, column]
        column += count
    call = (ctypes.c_int64 * len(fields))(*fields)
    parallel(
        _compiled(width, STORED[weights[0].dtype])[largest - 1], ctypes.addressof(call), torch.get_num_threads(), 0
    )
    return y


@lru_cache
def _compiled(columns: int, stored: str) -> tuple[int, ...]:
    """Compiles the products of inputs with so many columns; returns their addresses, by rows of a tile."""
    own = registers()
    assert own is not None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(assembly(own, columns, stored))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return tuple(engine.get_function_address(f"product_{rows}") for rows in range(1, own.rows + 1))


@lru_cache
def _openmp() -> Any:
    """Returns the function of PyTorch's OpenMP library that runs another one on each thread; None without it (Linux).

    Also tells LLVM where its functions are.
    """
    if llvm is None or not MAPS.exists():
        return None
    libraries = dict.fromkeys(line.split()[-1] for line in MAPS.read_text().splitlines() if "libgomp" in line)
    own = [path for path in libraries if "torch" in path] or list(libraries)
    if not own:
        return None
    library = ctypes.CDLL(own[0])
    for name in SYMBOLS:
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    parallel = library.GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel
