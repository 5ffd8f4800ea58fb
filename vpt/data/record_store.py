"""Files of records of any size, read one record at a time.

The first use of a file notes where each record begins and ends, with a progress bar, and checks that each is JSON. The
note is kept (in `$VPT_CACHE`, or `~/.cache/vpt`) under the file's name, size and time of change; later starts map it
into memory and read nothing else. Nothing but the record that is asked for is ever held.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vpt.errors import DataError
from vpt.utils.files import atomic_file

CHUNK = 1 << 24  # bytes read at a time while indexing
_BLANKS = re.compile(r"[ \t\r\n]*")


class RecordStore(Sequence[tuple[str, Any]]):
    """Records of one JSON (a list), JSONL or Parquet file: (what to call it in messages, decoded JSON)."""

    def __init__(self, path: Path) -> None:
        """Open a file and its index, made if need be.

        Raises:
            DataError: where the file is missing, empty or not of its format; names the line or record.
        """
        self.name = path
        if not path.is_file():
            raise DataError(f"record file {path} does not exist")
        if path.suffix == ".parquet":
            path = _as_lines(path)
        self._lines = path.suffix != ".json"
        self._spans = _index(path, self._lines, self.name)
        self._file = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        start, stop, number = (int(value) for value in self._spans[index])
        # pread: forked workers share the descriptor, and so the place that read would move.
        return self._label(number), json.loads(os.pread(self._file, stop - start, start))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}  # a worker that was not forked opens the files again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]

    def _label(self, number: int) -> str:
        return f"{self.name}:{number}" if self.name.suffix == ".jsonl" else f"{self.name}: record {number}"


def cache_folder() -> Path:
    """Where indexes are kept."""
    return Path(os.environ.get("VPT_CACHE", Path.home() / ".cache" / "vpt")) / "records"


def _cache_key(path: Path) -> str:
    state = path.stat()
    return hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:32]


def _index(path: Path, lines: bool, name: Path) -> np.ndarray:
    """[records, 3] int64, mapped into memory: first byte, end, and the line (or record) number of each."""
    kept = cache_folder() / f"{_cache_key(path)}.npy"
    if not kept.is_file():
        spans = _spans_of_lines(path, name) if lines else _spans_of_list(path)
        table = np.array(list(spans), dtype=np.int64).reshape(-1, 3)
        if not len(table):
            raise DataError(f"{name} holds no records")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as draft, draft.open("wb") as file:
            np.save(file, table)
    return np.load(kept, mmap_mode="r", allow_pickle=False)


def _bar(path: Path) -> tqdm:
    size = path.stat().st_size
    return tqdm(total=size, unit="B", unit_scale=True, desc=f"indexing {path.name}", disable=size < CHUNK)


def _spans_of_lines(path: Path, name: Path) -> Iterator[tuple[int, int, int]]:
    position = 0
    with path.open("rb") as file, _bar(path) as bar:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    json.loads(line)
                except (ValueError, RecursionError) as error:  # JSON, UTF-8, numbers too long; lists in lists
                    raise DataError(f"{name}:{number}: not valid JSON: {error}") from None
                yield position, position + len(line), number if name.suffix != ".parquet" else number - 1
            position += len(line)
            bar.update(len(line))


def _spans_of_list(path: Path) -> Iterator[tuple[int, int, int]]:
    """Walk over `[{...}, {...}, ...]` without holding more than a chunk and a record of it."""
    reader = _ListReader(path)
    with _bar(path) as bar:
        for number, (start, stop) in enumerate(reader):
            yield start, stop, number
            bar.update(stop - bar.n)


class _ListReader:
    """Spans, in bytes, of the elements of a JSON list in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.decoder = path, json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        with self.path.open("rb") as file:
            # the text in hand, where in it we are, and which byte of the file that is
            self._file, self._text, self._at, self._byte = file, "", 0, 0
            self._utf8 = codecs.getincrementaldecoder("utf-8")()
            if self._next() != "[":
                raise DataError(f"{self.path} must hold a list of records; or name it .jsonl")
            self._go(1)
            closed = self._next() == "]"
            while not closed:
                yield self._element()
                mark = self._next()
                if mark not in (",", "]"):
                    raise self._broken("expected ',' or ']' after a record")
                self._go(1)
                closed = mark == "]"

    def _element(self) -> tuple[int, int]:
        self._next()
        while True:
            try:
                _, end = self.decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self._broken(error.msg) from None
            except (ValueError, RecursionError) as error:  # a number too long; lists in lists
                raise self._broken(str(error)) from None
        start = self._byte
        self._go(end - self._at)
        return start, self._byte

    def _next(self) -> str:
        """Skip white space; the next character, empty at the end."""
        while True:
            blank = _BLANKS.match(self._text, self._at)
            self._go(len(blank[0]) if blank else 0)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _go(self, characters: int) -> None:
        passed = self._text[self._at : self._at + characters]
        self._at += characters
        self._byte += len(passed.encode())

    def _more(self) -> bool:
        """Read on; what lies behind us is dropped."""
        chunk = self._file.read(CHUNK)
        try:
            self._text = self._text[self._at :] + self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self._broken(f"not UTF-8 ({error.reason})") from None
        self._at = 0
        return bool(chunk)

    def _broken(self, why: str) -> DataError:
        return DataError(f"{self.path} is not valid JSON near byte {self._byte}: {why}")


def _as_lines(path: Path) -> Path:
    """A Parquet file as JSONL in the cache: rows of a column file cannot be read one at a time."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is a Parquet file; type: pip install pyarrow") from None
    kept = cache_folder() / f"{_cache_key(path)}.jsonl"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        table = parquet.ParquetFile(path)
        bar = tqdm(total=table.metadata.num_rows, unit="record", desc=f"reading {path.name}")
        with atomic_file(kept) as draft, draft.open("w", encoding="utf-8") as file, bar:
            for batch in table.iter_batches(batch_size=1000):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
                bar.update(batch.num_rows)
    return kept
