"""Write files and folders so that they are complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_NUMBERS = count()  # threads of one process may write the same file


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: renamed to `path` at the end, removed on an error. The last of several wins."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{next(_NUMBERS)}.tmp")
    try:
        yield draft
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
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file, which is there whole or as it was."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
