"""The device that a run uses, and giving its memory back."""

import gc

import torch

from vpt.errors import ConfigError
from vpt.utils.heap import in_libc


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
    in_libc("malloc_trim", 0)  # what `keep_freed_heap` has kept
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
