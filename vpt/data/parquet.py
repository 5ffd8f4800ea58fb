"""Parquet files as JSON lines, for rows of a column file cannot be read one at a time, and the images inside of them.

An image is bytes, or a struct of `bytes` and `path` as the hub's data sets have it, or a list of such. Lines name it by
its place (`train.parquet/images/17/0`), and its bytes are read with the row group that it lies in.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.data.index_cache import OPEN_FILES
from vpt.errors import DataError, shortened
from vpt.utils.files import atomic_file

ROWS = 100  # read at a time
GROUPS = 4  # row groups of images that a process holds
_IMAGE = {"bytes", "path"}


def write_as_lines(source: Path, target: Path, name: str) -> None:
    """Write each row of a Parquet file as a line of JSON; `target` appears whole or not at all.

    Args:
        source: the file.
        target: the lines.
        name: what the file is called in the paths of its images.

    Raises:
        DataError: without pyarrow, for a file that is not Parquet, and for a value that JSON has no word for, with its
            column and row.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{source} is a Parquet file; type: pip install pyarrow") from None
    try:
        with (
            parquet.ParquetFile(source) as table,
            atomic_file(target) as draft,
            draft.open("w", encoding="utf-8") as file,
        ):
            columns = _without_bytes([table.schema.column(number).path for number in range(len(table.schema))])
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=ROWS, columns=columns))
            rows = enumerate(row for batch in batches for row in batch)
            for number, row in tqdm(rows, f"reading {source.name}", table.metadata.num_rows, unit="record"):
                placed = {column: _placed(cell, f"{name}/{column}/{number}") for column, cell in row.items()}
                file.write(_line(placed, f"{source}: record {number}"))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{source} cannot be read as Parquet: {error}; write the file again") from None


def _without_bytes(columns: Sequence[str]) -> list[str]:
    """Leaf columns but the `bytes` of images: of those it is enough to know that they are there."""
    inside: dict[str, set[str]] = {}
    for column in columns:
        parent, _, leaf = column.rpartition(".")
        inside.setdefault(parent, set()).add(leaf)
    return [column for column in columns if not (column.endswith(".bytes") and inside[column[:-6]] == _IMAGE)]


def _placed(cell: Any, place: str) -> Any:
    """A cell with the place of each image instead of the image."""
    if isinstance(cell, list):
        return [_placed(item, f"{place}/{number}") for number, item in enumerate(cell)]
    return place if isinstance(cell, bytes) or (isinstance(cell, dict) and cell.keys() == {"path"}) else cell


class ParquetImages:
    """The images of one file, read a row group at a time (`_row_group`)."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path)
        about = self._file.metadata
        self._ends = list(accumulate(about.row_group(number).num_rows for number in range(about.num_row_groups)))

    def row_group(self, number: int, column: str) -> Any:
        """A column of a row group."""
        # The process may be a fork of one in which Arrow had threads
        return self._file.read_row_group(number, columns=[column], use_threads=False).column(column)

    def read(self, column: str, row: int, within: Sequence[int]) -> bytes:
        """The bytes of a cell, or of an item of the list that it is. Raises whatever comes where there are none."""
        group = bisect_right(self._ends, row)
        cell = _row_group(self, group, column)[row - self._ends[group]].as_py()  # from the end of the group
        for number in within:
            cell = cell[number]
        found = cell["bytes"] if isinstance(cell, Mapping) else cell
        if not isinstance(found, bytes):
            raise TypeError(f"it holds {type(found).__name__}, not bytes")
        return found


@lru_cache(maxsize=GROUPS)
def _row_group(images: ParquetImages, number: int, column: str) -> Any:
    return images.row_group(number, column)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, *_state: int) -> ParquetImages:
    return ParquetImages(path)


def read_cell(path: Path, place: str) -> bytes:
    """The image at `COLUMN/ROW`, or at `COLUMN/ROW/NUMBER` of a list. Raises OSError where there is none."""
    column, *numbers = place.split("/")
    try:
        row, *within = map(int, numbers)
        state = path.stat()  # a file that was replaced, or a process that was forked, opens it anew
        return _opened(path, os.getpid(), state.st_ino, state.st_size, state.st_mtime_ns).read(column, row, within)
    except Exception as error:  # another library's, about whatever stands in the file
        raise OSError(f"{path.name} has no image there: {shortened(str(error))}") from None


def _line(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, ValueError):
        column, value = next((name, found) for name in row if (found := _foreign(row[name])) is not None)
        raise DataError(
            f"{where}: column `{column}` holds {type(value).__name__}, which records cannot hold; "
            "write it as text, or drop the column"
        ) from None


def _foreign(value: Any) -> Any:
    """The first value inside that JSON has no word for, or None."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for item in inner if (found := _foreign(item)) is not None), None)
    return None if isinstance(value, str | int | float | None) else value
