"""Freed memory stays with the process.

A training step frees and takes the same blocks again and again. glibc hands the end of its heap back to the kernel as
soon as some tens of megabytes there are free, and the kernel clears every page of them anew: tens of thousands of page
faults a step. torch's allocator for GPUs keeps what it has for the same reason.
"""

import ctypes

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM = 2**31 - 1
# The largest that glibc takes, and where its own rule ends up. Larger blocks stay apart: aligned ones as large leave
# gaps in the heap that the next one of their size does not fit.
_LARGEST_IN_HEAP = 2**25


def keep_freed_heap() -> bool:
    """Ask glibc to keep what this process frees, for as long as it runs. Returns whether there was a glibc to ask."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows, where None names no library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM))
