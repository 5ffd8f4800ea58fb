"""The device that a run uses, and the heap of a process that trains on the CPU."""

import ctypes
import gc

import torch

from vpt.errors import ConfigError

# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_TRIM = 2**31 - 1
# The largest that glibc takes, and where its own rule ends up. Larger blocks stay apart: aligned ones as large leave
# gaps in the heap that the next one of their size does not fit.
_LARGEST_IN_HEAP = 2**25


def keep_freed_heap() -> bool:
    """Let glibc keep the memory that this process frees. Returns False where there is no glibc."""
    settings = ((_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_TRIM_THRESHOLD, _LARGEST_TRIM))
    return all(_in_libc("mallopt", *setting) for setting in settings)


def share_heap() -> bool:
    """Let all threads use one heap of glibc's: each with its own, a server's threads leave gaps in all of them. Returns
    False where there is no glibc. Before there are threads.
    """
    return _in_libc("mallopt", _ARENA_MAX, 1)


def _in_libc(function: str, *arguments: int) -> bool:
    """What one of glibc's functions says; False where there is none."""
    try:
        return bool(getattr(ctypes.CDLL(None), function)(*arguments))
    except (OSError, AttributeError, TypeError):  # another C library, or Windows, where None names no library
        return False


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` names; of several GPUs that of this process.

    Raises ConfigError for `cuda` where there is no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU here; type device=cpu, or device=auto for what there is")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def free_unreachable() -> None:
    """Give back the memory, on GPUs too, of models that nobody refers to: they are in cycles of references."""
    gc.collect()
    _in_libc("malloc_trim", 0)  # what `keep_freed_heap` has kept
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
