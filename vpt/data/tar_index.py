"""Members of a tar file by name, read from the middle of it.

The first use of a file notes where each member lies, with a progress bar; later the note is mapped into memory.
"""

import tarfile
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vpt.data.index_cache import OPEN_FILES, kept_index

FORMAT = "tar 1"  # of what is kept
PROGRESS_BAR_BYTES = 1 << 28  # bytes of a file from which on a bar is shown


class TarIndex:
    """Where the members of one file lie: [3, members] of the name's hash, first byte and length, by hash."""

    def __init__(self, path: Path) -> None:
        self.path, self._table = path, kept_index(path, FORMAT, lambda: _table(path))

    def read(self, member: str) -> bytes:
        """A member's bytes. Raises OSError where there is none, or where the file is not as it was indexed."""
        wanted = _hash(member)
        place = int(np.searchsorted(self._table[0], wanted))
        if place == self._table.shape[1] or self._table[0, place] != wanted:
            raise FileNotFoundError(f"it has no such member; `tar tf {self.path.name}` lists them")
        start, length = (int(value) for value in self._table[1:, place])
        with self.path.open("rb") as file:
            file.seek(start - tarfile.BLOCKSIZE)
            header, content = file.read(tarfile.BLOCKSIZE), file.read(length)
        if len(content) != length or not _begins_member(header, length):
            raise OSError(f"{self.path.name} is cut short, or was changed while it was in use")
        return content


def read_member(path: Path, member: str) -> bytes:
    """A member's bytes. Raises OSError where there is none, or where the file is cut."""
    state = path.stat()
    return _indexed(path, state.st_ino, state.st_size, state.st_mtime_ns).read(member)


@lru_cache(maxsize=OPEN_FILES)
def _indexed(path: Path, *_state: int) -> TarIndex:
    return TarIndex(path)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.removeprefix("./").encode(), digest_size=8).digest(), signed=True)


def _begins_member(header: bytes, length: int) -> bool:
    try:  # a size of 0 is one that a PAX header tells
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size in (length, 0)
    except tarfile.HeaderError:
        return False


def _table(path: Path) -> np.ndarray:
    rows = {_hash(info.name): (info.offset_data, info.size) for info in _members(path)}  # the last of a name counts
    return np.array(sorted((name, *place) for name, place in rows.items()), dtype=np.int64).reshape(-1, 3).T.copy()


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Files of a tar file. Raises OSError where it is none, or ends within a member."""
    size = path.stat().st_size
    try:
        if size % tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends within a block")
        with (
            tarfile.open(path, "r:") as file,
            tqdm(
                total=size, unit="B", unit_scale=True, desc=f"indexing {path.name}", disable=size < PROGRESS_BAR_BYTES
            ) as bar,
        ):
            while (info := file.next()) is not None:
                file.members = []  # type: ignore[attr-defined]  # else all of them are held
                if info.isreg():
                    if info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"{info.name} is cut short")
                    yield info
                bar.update(info.offset_data - bar.n)
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{path.name} is no whole tar file: {error}") from None
