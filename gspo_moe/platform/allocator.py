"""Has this process keep the memory that it frees, in huge pages, where tensors are on the CPU.

torch takes every CPU tensor from malloc. glibc's gives large blocks back to the kernel when they are freed, and the
next tensor pays for each 4 KiB of them again: a fault and a page of zeros, at some 1 to 3 GB/s on a virtual machine.
Blocks that stay in the heap pay once, and huge pages make that one time a tenth.

The peak is what it was, but between two peaks the memory stays with the process. `GSPO_MOE_KEEP_MEMORY=0` leaves malloc
as it is. malloc(3), mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h
HUGE_PAGES = 14  # MADV_HUGEPAGE, of sys/mman.h
HUGE = 2**21  # bytes, on x86-64 and on arm64 with pages of 4 KiB
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
STRICT = "2"  # where address space counts as memory, used or not


def keep_freed_memory() -> bool:
    """Asks glibc's malloc for it, for the rest of this process's life; False where that is another's or not wanted."""
    if os.environ.get("GSPO_MOE_KEEP_MEMORY", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1)):
        return False
    if OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() != STRICT:
        _advise_heap(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return True


def _advise_heap(libc: ctypes.CDLL, size: int) -> None:
    """Has the heap's next `size` bytes, which malloc will give out, be huge pages; takes address space alone."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    first = block + -block % HUGE
    libc.madvise(first, (block + size - first) // HUGE * HUGE, HUGE_PAGES)  # refused where the kernel has none
    libc.free(block)
