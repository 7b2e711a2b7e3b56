"""The C library's allocator: what a process does with memory that it has freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors; returns whether the C library can be told so.

    By default glibc gives every large block back to the kernel, which fills it with zeros again, page by page, when the
    next tensor of that size is made: in a call of a force field on a CPU a fifth of the time. It is a setting of the
    whole process and thus left to programs: the command line makes it, a script may. The process stays as large as it
    once had to be.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    # Older versions take no more than 32 MB.
    large_blocks = mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(large_blocks and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Give freed memory back to the kernel, once, so that a process is as large as what it holds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
