"""Files of records of any size, read one record at a time.

The first use of a file notes where each record begins and ends, with a progress bar, and checks that each is JSON. The
note is kept (in `$VPT_CACHE`, or `~/.cache/vpt`) under the file's name, size and time of change; later starts map it
into memory and read nothing else. Nothing but the record that is asked for is ever held.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from vpt.data.index_cache import cached_name, kept_index
from vpt.data.parquet import write_as_lines
from vpt.errors import DataError, shortened

CHUNK = 1 << 24  # bytes read at a time while indexing
FORMAT = "3"  # of what is kept, and of how files are checked before it is
MARK = "\ufeff".encode().decode("latin-1")  # a byte order mark, as _ListReader decodes it
_BLANKS, _DECODER = (" ", "\t", "\r", "\n"), json.JSONDecoder()


class RecordStore(Sequence[tuple[str, Any]]):
    """Records of one JSON (a list), JSONL or Parquet file: (its name in messages, decoded JSON)."""

    def __init__(self, path: Path, called: str | None = None) -> None:
        """Open a file and its index, made if need be.

        Args:
            path: the file.
            called: what paths of images inside a Parquet file begin with; by default its name.

        Raises:
            DataError: where the file is missing, empty or not of its format; names the line or record.
        """
        self.name, self.called = path, called or path.name
        if not path.is_file():
            raise DataError(f"record file {path} does not exist")
        if path.suffix == ".parquet":
            path = _parquet_as_lines(path, self.called)
        self._lines = path.suffix != ".json"
        self._spans = kept_index(path, FORMAT, partial(_spans, path, self._lines, self.name))
        self._file = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        start, stop, number = (int(value) for value in self._spans[index])
        # pread: forked workers share the descriptor, and so the place that read would move.
        return self._label(number), json.loads(os.pread(self._file, stop - start, start))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "called": self.called}  # a worker that was not forked opens the files again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"], state["called"])  # type: ignore[misc]

    def _label(self, number: int) -> str:
        return f"{self.name}:{number}" if self.name.suffix == ".jsonl" else f"{self.name}: record {number}"


def _parquet_as_lines(path: Path, name: str) -> Path:
    """The lines that a Parquet file was written as in the cache, now or before."""
    kept = cached_name(path, f"{FORMAT} {name}", ".jsonl")
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_as_lines(path, kept, name)
    return kept


def _spans(path: Path, lines: bool, name: Path) -> np.ndarray:
    """[records, 3] int64: first byte, end, and the line (or record) number of each."""
    spans = _spans_of_lines(path, name) if lines else _spans_of_list(path)
    table = np.array(list(spans), dtype=np.int64).reshape(-1, 3)
    if not len(table):
        raise DataError(f"{name} holds no records")
    return table


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
    """Parse `[{...}, {...}, ...]` holding a chunk and a record of it, or all that follows a syntax error."""
    with path.open("rb") as file, _bar(path) as bar:
        reader = _ListReader(path, file)
        reader.skip_byte_order_mark()
        if reader.next_character() != "[":
            raise DataError(f"{path} must hold a list of records; or name it .jsonl")
        reader.at += 1
        mark, number = reader.next_character(), 0
        while mark != "]":
            start, stop = reader.element()
            yield start, stop, number
            number += 1
            bar.update(stop - bar.n)
            mark = reader.next_character()
            if mark not in (",", "]"):
                raise reader.error("expected ',' or ']' after a record")
            reader.at += 1
        if number and reader.next_character():
            rest = reader.text[reader.at : reader.at + 400].encode("latin-1").decode(errors="replace")
            raise reader.error(
                f"after the list of records comes {shortened(rest)}; put all records into one list, or one a line into "
                "a file named .jsonl"
            )


class _ListReader:
    """Reads a JSON list from a file.

    Its text is decoded as Latin-1, a character for each byte, so that places in the text are bytes of the file: what
    JSON marks records with is ASCII. Each record is then checked to be UTF-8.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.dropped = "", 0, 0  # text at hand, the place in it, and bytes of the file before it

    def element(self) -> tuple[int, int]:
        """The first byte of the next element, and the one after its last."""
        self.next_character()
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
                self.text[self.at : end].encode("latin-1").decode()
                break
            except json.JSONDecodeError as error:
                if not self._read():
                    raise self.error(error.msg) from None
            except UnicodeDecodeError as error:
                raise self.error(f"not UTF-8 ({error.reason})") from None
            except (ValueError, RecursionError) as error:  # a number too long; lists in lists
                raise self.error(str(error)) from None
        start, self.at = self.dropped + self.at, end
        return start, self.dropped + end

    def skip_byte_order_mark(self) -> None:
        """Pass over the mark that some editors put before UTF-8."""
        while len(self.text) < len(MARK) and self._read():
            pass
        self.at = len(MARK) if self.text.startswith(MARK) else 0

    def next_character(self) -> str:
        """Skip white space; the next character, empty at the end."""
        while True:
            while self.text[self.at : self.at + 1] in _BLANKS:
                self.at += 1
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _read(self) -> bool:
        """Read the next chunk; drop text already parsed."""
        chunk = self.file.read(CHUNK)
        self.dropped += self.at
        self.text, self.at = self.text[self.at :] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def error(self, why: str) -> DataError:
        """An error at the place where the reader is."""
        return DataError(f"{self.path} is not valid JSON near byte {self.dropped + self.at}: {why}")
