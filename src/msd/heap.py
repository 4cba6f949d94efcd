"""Freed memory kept by the process. The allocator's default hands large blocks back to the system at once.

Passes over many rows allocate and free tensors of hundreds of megabytes; handed back each time, their pages are mapped
and zeroed again each time. Capture and training lose a quarter of their time to that.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 2**31 - 1  # bytes; what mallopt takes


def keep_freed() -> bool:
    """Has this process keep what it frees, for good; False where the C library has no such setting."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(bool(libc.mallopt(option, LARGEST)) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
