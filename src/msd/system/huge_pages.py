"""How the process gets memory for large tensors: in huge pages.

Passes over many rows allocate and free tensors of hundreds of megabytes, which the C library hands back to the system
at once. Each time anew their pages are mapped and zeroed, 4 kB a piece by default: on a virtual machine that can cost
several times what filling them costs. (Keeping freed blocks instead, by `mallopt`, was tried: aligned blocks of
ever other sizes leave gaps, and a capture grew by a gigabyte in five minutes.)
"""

from __future__ import annotations

import os


def use_huge_pages() -> None:
    """Sets the process up, before its first tensor; a variable that the user has set stays as it is."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator when it first allocates
