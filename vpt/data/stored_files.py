"""Files of a data set: on the disk, in a tar file, or in a column of a Parquet file; no more is read than is asked for.

images/1.jpg                   a file
shards/00000.tar/dogs/1.jpg    a member of an uncompressed tar file
train.parquet/image/17         row 17 of the column `image`: bytes, or `bytes` and `path`, as the hub's data sets
train.parquet/images/17/0      have them; or the first of a list of such
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from vpt.data.parquet import read_cell
from vpt.data.tar_index import read_member

READERS: dict[str, Callable[[Path, str], bytes]] = {".tar": read_member, ".parquet": read_cell}
_CONTAINER = re.compile(r"\.(?:tar|parquet)(?:/|$)")
_COMPRESSED = re.compile(r"\.(?:tar\.\w+|tgz|zip)/")


@dataclass(frozen=True)
class StoredFile:
    """A file on the disk, or the one called `member` inside of it."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return str(self.path / self.member)

    @property
    def suffix(self) -> str:
        """What the file's own name ends in, in small letters."""
        return Path(self.member or self.path).suffix.lower()

    def read(self) -> bytes:
        """All its bytes. Raises OSError where there is no such member, or its container is broken."""
        return READERS[self.path.suffix](self.path, self.member) if self.member else self.path.read_bytes()

    def opened(self) -> Path | BytesIO:
        """What Pillow opens."""
        return BytesIO(self.read()) if self.member else self.path

    def ends(self) -> tuple[bytes, bytes]:
        """Its first 4 and last 64 bytes."""
        if self.member:
            content = self.read()
            return content[:4], content[-64:]
        with self.path.open("rb") as file:
            head = file.read(4)
            file.seek(max(self.path.stat().st_size - 64, 0))
            return head, file.read()


def find_stored(path: Path) -> StoredFile | None:
    """The file of a path, which may lead through a container; None where there is none.

    Raises:
        OSError: for a path through a compressed container.
    """
    text = str(path)
    for found in _CONTAINER.finditer(text):
        container = Path(text[: found.end()].rstrip("/"))
        if container.is_file() and text[found.end() :]:
            return StoredFile(container, text[found.end() :])
    if packed := _COMPRESSED.search(text):
        container = Path(text[: packed.end() - 1])
        if container.is_file():
            raise OSError(f"{container.name} is compressed: make a plain .tar of it, which is read from the middle")
    return StoredFile(path) if path.is_file() else None
