"""Parquet files as JSON lines: rows of a column file cannot be read one at a time."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.errors import DataError
from vpt.utils.files import atomic_file

ROWS = 1000  # read at a time


def write_as_lines(source: Path, target: Path) -> None:
    """Write each row of a Parquet file as a line of JSON; `target` appears whole or not at all.

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
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=ROWS))
            rows = enumerate(row for batch in batches for row in batch)
            for number, row in tqdm(rows, f"reading {source.name}", table.metadata.num_rows, unit="record"):
                file.write(_line(row, f"{source}: record {number}"))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{source} cannot be read as Parquet: {error}; write the file again") from None


def _line(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, ValueError):
        column, value = next((name, found) for name in row if (found := _foreign(row[name])) is not None)
        files = "save images as files below data.root and put their paths there"
        raise DataError(
            f"{where}: column `{column}` holds {type(value).__name__}, which records cannot hold; "
            f"{files if isinstance(value, bytes) else 'write it as text'}, or drop the column"
        ) from None


def _foreign(value: Any) -> Any:
    """The first value inside that JSON has no word for, or None."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for item in inner if (found := _foreign(item)) is not None), None)
    return None if isinstance(value, str | int | float | None) else value
