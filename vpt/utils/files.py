"""Write files and folders so that they are complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_NUMBERS = count()  # threads of one process may write the same file
_UMASK = os.umask(0)  # it can be read by setting it alone
os.umask(_UMASK)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: renamed to `path` at the end, removed on an error. The last of several wins."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{next(_NUMBERS)}.tmp")
    try:
        yield draft
        apply_umask(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which must not exist: renamed to `path` at the end, removed on an error."""
    draft = path.with_name(f".writing_{path.name}")
    shutil.rmtree(draft, ignore_errors=True)  # a killed process left it
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            apply_umask(file)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file, which is there whole or as it was."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def apply_umask(file: Path) -> None:
    """Let a file be read and written by whom the umask says: safetensors gives its files to their owner alone."""
    if file.is_file():
        file.chmod(0o666 & ~_UMASK)
