"""Indexes of large files, kept under the file's name, size and time of change, and mapped into memory."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vpt.utils.files import atomic_file

OPEN_FILES = 256  # of a kind that a process holds open; a mapped index is one, too


def cache_folder() -> Path:
    """Where indexes are kept."""
    return Path(os.environ.get("VPT_CACHE", Path.home() / ".cache" / "vpt")) / "records"


def cached_name(path: Path, version: str, suffix: str) -> Path:
    """Where what was made of a file is kept: another place once the file or the way of making it has changed."""
    state = path.stat()
    about = f"{version}|{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    return cache_folder() / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}{suffix}"


def kept_index(path: Path, version: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The index of a file, mapped into memory; `make` makes it the first time."""
    kept = cached_name(path, version, ".npy")
    if not kept.is_file():
        table = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as draft, draft.open("wb") as file:
            np.save(file, table)
    return np.load(kept, mmap_mode="r", allow_pickle=False)
