"""How the process gets memory for large tensors: in huge pages, and kept when freed.

Passes over many rows allocate and free tensors of hundreds of megabytes. By default the C library hands them back to
the system at once, and each time anew their pages are mapped and zeroed, 4 kB a piece: on a virtual machine that can
cost ten times what filling them costs. Huge pages cut the number of pieces, keeping freed blocks does the rest.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 2**31 - 1  # bytes; what mallopt takes


def use_large_blocks() -> bool:
    """Sets the process up, for good and before its first tensor; False where the C library has no such settings."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator when it first allocates
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(bool(libc.mallopt(option, LARGEST)) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
