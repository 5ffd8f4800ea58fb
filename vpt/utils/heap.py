"""The heap of a process, where the C library is glibc."""

import ctypes

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_TRIM = 2**31 - 1
# The largest that glibc takes, and where its own rule ends up. Larger blocks stay apart: aligned ones as large leave
# gaps in the heap that the next one of their size does not fit.
_LARGEST_IN_HEAP = 2**25


def keep_freed_heap() -> bool:
    """Let glibc keep the memory that this process frees. Returns False where there is no glibc."""
    settings = ((_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_TRIM_THRESHOLD, _LARGEST_TRIM))
    return all(in_libc("mallopt", *setting) for setting in settings)


def share_heap() -> bool:
    """Let all threads use one heap of glibc's: each with its own, a server's threads leave gaps in all of them. Returns
    False where there is no glibc. Before there are threads.
    """
    return in_libc("mallopt", _ARENA_MAX, 1)


def in_libc(function: str, *arguments: int) -> bool:
    """What one of glibc's functions says; False where there is none."""
    try:
        return bool(getattr(ctypes.CDLL(None), function)(*arguments))
    except (OSError, AttributeError, TypeError):  # another C library, or Windows, where None names no library
        return False
